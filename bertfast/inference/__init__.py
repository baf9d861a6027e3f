"""Inference: predictions of fine-tuned models, embeddings and masked-token prediction."""
