"""Sparse kernels for CPUs: convolutions and linear layers with any mask. Their C++ is in native/; what one
layer runs is in plan.py, the operators are in operator.py, what is measured and chosen in kernel.py."""
