"""2:4 on NVIDIA's sparse tensor cores, by cuSPARSELt; elsewhere a reference. 2:4 masks: sparsity.patterns."""
