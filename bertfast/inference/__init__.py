"""Prediction, embeddings and mask filling."""
