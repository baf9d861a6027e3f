"""Triton kernels of bertfast, one operation per file."""
