"""Torch twins and native kernels; use them through `moe_runtime.kernels.ops`."""
