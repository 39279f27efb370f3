"""The parts of `scripts/bench_ep_layer.py`."""
