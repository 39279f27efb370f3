"""Parts of `bench_balancer.py`."""
