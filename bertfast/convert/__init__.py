"""Conversion between checkpoint and model formats."""
