"""The parts of `bench_big_models.py`: published shapes as GGUF files, the runs, the ranks' memory, the report."""
