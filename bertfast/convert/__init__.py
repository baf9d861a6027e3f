"""Conversion between checkpoint formats: export, and import of TensorFlow checkpoints."""
