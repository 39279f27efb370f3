"""Parts of `bench_balance.py`."""
