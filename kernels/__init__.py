"""Triton kernels of bertfast, one operation a file."""
