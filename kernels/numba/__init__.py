"""numba kernels for CPUs without a C++ compiler, one file per op."""
