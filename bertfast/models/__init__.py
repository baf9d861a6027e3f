"""Models: transformers' classes, fused, and extensions that transformers does not have."""
