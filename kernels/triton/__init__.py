"""Triton kernels for NVIDIA GPUs, one file per op."""
