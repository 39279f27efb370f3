"""Measures how much of a decode step is spent outside the native kernels: wall time, one rank, in this process.

Every call of the native library is timed. The layers are timed from start to end, because they run while the next step
is planned. The rest of a step is Python and torch; `--functions` shows the time per function.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import pstats
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.engine import Engine
from moe_runtime.kernels.cpu import loader
from moe_runtime.types.sampling_params import SamplingParams

PROMPT_TOKENS = 128


class TimedLibrary:
    """The native library, with the time that it ran since the last call of `take`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._seconds, self._calls = 0.0, 0
        self._layers_since: float | None = None  # set while layers run in parallel with Python

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def timed(*arguments: Any) -> Any:
            since = self._layers_since
            start = time.perf_counter() if since is None else since
            result = function(*arguments)
            if name == "moe_layers_begin":
                self._layers_since = start
            else:
                self._seconds += time.perf_counter() - start
                self._layers_since = None
            self._calls += 1
            return result

        setattr(self, name, timed)
        return timed

    def take(self) -> tuple[float, int]:
        """Seconds and calls."""
        now = time.perf_counter()
        if self._layers_since is not None:
            self._seconds += now - self._layers_since
            self._layers_since = now
        taken = self._seconds, self._calls
        self._seconds, self._calls = 0.0, 0
        return taken


def decode(engine: Engine, library: TimedLibrary, batch: int, steps: int, profile: cProfile.Profile | None) -> str:
    """Prefill `batch` prompts, then decode; returns the table's row, with medians over the steps."""
    params = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
    for index in range(batch):
        prompt = [random.randrange(engine.model_config.vocab_size) for _ in range(PROMPT_TOKENS)]
        engine.add_request(str(index), prompt, params)
    first = engine.stats().generation_tokens + batch
    while engine.stats().generation_tokens < first:
        engine.step()
    whole, inside, calls = [], [], []
    if profile:
        profile.enable()
    while engine.has_work:
        library.take()
        start = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - start)
        seconds, count = library.take()
        inside.append(seconds)
        calls.append(count)
    if profile:
        profile.disable()
    rest = [step - kernels for step, kernels in zip(whole, inside, strict=True)]
    step_ms, rest_ms = statistics.median(whole) * 1e3, statistics.median(rest) * 1e3
    return f"| {batch} | {step_ms:.2f} | {statistics.median(calls):.0f} | {rest_ms:.2f} | {rest_ms / step_ms:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--functions", action="store_true", help="list the functions in which the rest is spent")
    options = parser.parse_args()

    kernels = loader.load()
    library = TimedLibrary(kernels.library)
    kernels.library = library  # type: ignore[assignment]
    config = EngineConfig(
        options.model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_batched_tokens=4096,
    )
    engine = build_engine(config)
    print("| sequences | step, ms | native calls | outside them, ms | share |\n|---|---|---|---|---|")
    for batch in options.batch:
        decode(engine, library, batch, 8, None)  # warms up
        print(decode(engine, library, batch, options.steps, None), flush=True)
        if options.functions:
            profile = cProfile.Profile()
            decode(engine, library, batch, options.steps, profile)
            pstats.Stats(profile).sort_stats("tottime").print_stats(20)
    engine.close()


if __name__ == "__main__":
    main()
