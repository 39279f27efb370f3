"""Torch twins and native kernels; `moe_runtime.kernels.ops` is the face."""
