"""Parts of `check_cluster.py`."""
