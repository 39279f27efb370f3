"""Compares step times of two checkouts of this repository, measured in turn, so that other work affects both equally.

Each checkout gets a process with its moe_runtime, which loads the model once as a single rank. The processes measure in
turn, while the other one waits: decode steps of several batches, and one long prompt in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LONG_PROMPT = 2048  # tokens, all in one step
PROMPT_TOKENS = 32  # before decode steps
BATCHES = (1, 8, 32)
WORKLOADS = {f"decode step, batch {batch}": batch for batch in BATCHES} | {f"prompt of {LONG_PROMPT} tokens": 0}
LOAD_DEADLINE = 600.0
MEASURE_DEADLINE = 300.0
END_DEADLINE = 30.0


def serve(pipe: Connection, model: str, steps: int) -> None:
    """Run the process of one checkout: load the model, then answer each batch with a time in milliseconds."""
    # Without this, modules missing here would come from an installed checkout.
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
    from moe_runtime import SamplingParams
    from moe_runtime.build import build_engine

    try:
        from moe_runtime.config.engine import EngineConfig
    except ModuleNotFoundError:  # a checkout from before the modules moved into rooms
        from moe_runtime.config import EngineConfig

    repeats = {"enable_prefix_caching": False} if hasattr(EngineConfig, "enable_prefix_caching") else {}
    config = EngineConfig(
        model,
        **repeats,
        dtype="bfloat16",
        device="cpu",
        skip_tokenizer_init=True,
        max_model_len=LONG_PROMPT + 16,
        max_num_batched_tokens=LONG_PROMPT,
        max_num_seqs=max(BATCHES),
    )
    engine = build_engine(config)
    for batch in WORKLOADS.values():
        measure(engine, SamplingParams, batch, 4)  # warms up
    pipe.send(sys.modules["moe_runtime"].__file__)
    while (batch := pipe.recv()) is not None:
        pipe.send(measure(engine, SamplingParams, batch, steps))
    engine.close()


def measure(engine: Any, params: Any, batch: int, steps: int) -> float:
    """Milliseconds of a decode step of `batch` sequences, the median of `steps`; batch 0 is the long prompt."""
    rng = random.Random(batch)
    length, num_new = (PROMPT_TOKENS, steps + 1) if batch else (LONG_PROMPT, 1)
    for index in range(batch or 1):
        prompt = [rng.randrange(engine.model_config.vocab_size) for _ in range(length)]
        engine.add_request(str(index), prompt, params(temperature=0.0, max_tokens=num_new, ignore_eos=True))
    if batch:  # all prompts fit into the first step
        engine.step()
    times = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    assert len(times) == (steps if batch else 1), f"{len(times)} steps"
    return statistics.median(times) * 1e3


class Checkout:
    """The process of one checkout.

    Raises:
        TimeoutError: it did not answer in time.
        EOFError: it has ended; its stderr shows the cause.
    """

    def __init__(self, tree: Path, model: str, steps: int) -> None:
        self.tree = tree
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-P", __file__, "--serve", str(theirs.fileno()), model, str(steps)]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        package = Path(self._receive(LOAD_DEADLINE))
        if not package.is_relative_to(tree):
            raise SystemExit(f"moe_runtime comes from {package}, not from {tree}")

    def measure(self, batch: int) -> float:
        """Milliseconds; see `measure`."""
        self._pipe.send(batch)
        return float(self._receive(MEASURE_DEADLINE))

    def close(self) -> None:
        with suppress(OSError):  # it has ended
            self._pipe.send(None)
        try:
            self._process.wait(END_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self, deadline: float) -> Any:
        if not self._pipe.poll(deadline):
            self._process.kill()
            raise TimeoutError(f"{self.tree}: no answer within {deadline:g} s")
        return self._pipe.recv()


def bench_model() -> str:
    """The folder of the model of `make_bench_model.py` (in this script's folder); written if it does not exist."""
    script = Path(__file__).with_name("make_bench_model.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def row(workload: str, old: Sequence[float], new: Sequence[float]) -> str:
    """A row of the table: medians, and median and quartiles of the ratios of the pairs."""
    ratios = [n / o for o, n in zip(old, new, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return (
        f"| {workload} | {statistics.median(old):.2f} | {statistics.median(new):.2f} "
        f"| {middle:.3f} | {low:.3f} to {high:.3f} |"
    )


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        _, _, descriptor, model, steps = sys.argv
        serve(Connection(int(descriptor)), model, int(steps))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout")
    parser.add_argument("new", type=Path, help="the checkout that is compared with it")
    parser.add_argument("--model", help="a checkpoint directory; default the bench model, made if it is not there")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a measurement, which is their median")
    parser.add_argument("--json", type=Path, help="file that takes all values, in milliseconds")
    options = parser.parse_args()

    model = options.model or bench_model()
    found: dict[str, dict[str, list[float]]] = {workload: {"old": [], "new": []} for workload in WORKLOADS}
    checkouts: dict[str, Checkout] = {}
    try:
        for name in ("old", "new"):
            checkouts[name] = Checkout(getattr(options, name).resolve(), model, options.steps)
        for pair in range(options.pairs):
            for workload, batch in WORKLOADS.items():
                for name in ("old", "new") if pair % 2 == 0 else ("new", "old"):
                    found[workload][name].append(checkouts[name].measure(batch))
    finally:
        for checkout in checkouts.values():
            checkout.close()
    print("| workload | old, ms | new, ms | new / old | quartiles |\n|---|---|---|---|---|")
    for workload, values in found.items():
        print(row(workload, values["old"], values["new"]))
    if options.json:
        trees = {"old": str(options.old.resolve()), "new": str(options.new.resolve())}
        options.json.write_text(json.dumps({**trees, "model": model, "workloads": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
