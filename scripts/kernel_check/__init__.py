"""Parts of `check_kernels.py`."""
