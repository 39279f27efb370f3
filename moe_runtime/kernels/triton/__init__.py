"""Triton kernels: device functions with one thin wrapper each."""
