"""What benchmarks.gpu_check runs besides the benchmarks and tests/gpu."""
