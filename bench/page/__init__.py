"""docs/BENCHMARKS.md and its plots, made from the files in bench/results/."""
