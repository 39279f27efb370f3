"""The benchmark against other engines: `scripts/bench_peers`. Each engine runs in an environment of its own.

Import direction: `__main__` -> `conductor` -> `report`, `drivers`, `environments`, `check`, `floor`. The engines
(`ours_engine`, `hf_engine`, `llamacpp_engine`, `vllm_engine`) and `machine` are processes; they import `protocol` only.
"""
