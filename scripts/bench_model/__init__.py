"""The parts of `make_bench_model.py`: shapes, random weights, and the GGUF file of the same weights."""
