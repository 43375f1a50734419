"""What the benchmarks share; the scripts stand one folder up."""
