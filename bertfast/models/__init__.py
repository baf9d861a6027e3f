"""Models: transformers' classes, fused, and the parts that are ours alone."""
