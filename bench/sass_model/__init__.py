"""Kernels compiled ahead of time: registers, spills and hazards in the machine code."""
