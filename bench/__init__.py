"""Benchmarks of bertfast, and checks of the machine code of its kernels; not part of the wheel."""
