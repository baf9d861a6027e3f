"""Benchmarks of whole steps, calls and programs."""
