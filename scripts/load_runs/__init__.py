"""The parts of `load_test.py`: questions with known answers, streams, a run, offline speed, the report."""
