"""The parts of `bench_structured_outputs.py`."""
