"""Time one expert-parallel layer, forward only: `deepspeed.moe.layer.MoE` and ours with each dispatcher.

Both have the same weights, and their outputs are compared: in float32, and in bfloat16 before every timing. Ranks are
processes over gloo with a share of the cores each. A call takes as long as its slowest rank. DeepSpeed, ours and the
floor are measured in turn; medians are reported, and ratios are taken pair by pair. Calls alternate between two layers
and several inputs, so that no cache holds the weights. With one rank, ours is the block of a single rank ("local").

The floor is the longer of two times: bytes that ours must read (packed experts that any token chose, and the gate) /
read bandwidth, and operations / rate of torch's large product. It is computed for all ranks together, and for the
busiest rank with the rates that it has alone. Communication between ranks is not included.

Needs the extra `deepspeed`: `pip install -e .[deepspeed]`, then `python scripts/bench_ep_layer.py`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from moe_runtime.cluster.host import divide_cores
from moe_runtime.kernels.cpu import loader, native

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from ep_layer.report import Result, draw, line, machine, table
from ep_layer.sides import (
    PEER_TIMEOUT,
    SHAPES,
    Call,
    DeepSpeedSide,
    OurSide,
    Shape,
    draw_inputs,
    normal,
)

ROUTINGS = ("balanced", "skewed")
TOKENS = (1, 4, 8, 32, 128, 256, 1024, 4096)
CHECKED_TOKENS, TOLERANCE = (1, 5, 96), {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Floor:
    """Read bandwidth and product rate, of all ranks at once and of one alone, measured on request."""

    def __init__(self, kernels: native.Kernels) -> None:
        self.kernels = kernels
        self.data = kernels.packed_empty(torch.float32, 1 << 15, 1 << 10).zero_()
        self.x, self.weight = normal(1, 1536, 1024).bfloat16(), normal(2, 2048, 1024).bfloat16()

    def seconds(self, nbytes_W: Tensor, flops_W: Tensor) -> float:
        read = partial(self.kernels.read, self.data)
        multiply = partial(F.linear, self.x, self.weight)
        least = 0.0
        for call, unit, work_W in (
            (read, self.data.nbytes, nbytes_W),
            (multiply, 2 * self.x.numel() * len(self.weight), flops_W),
        ):
            together = unit * dist.get_world_size() / slowest(call)
            alone = unit / slowest(call if dist.get_rank() == 0 else lambda: None)
            least = max(least, float(work_W.sum()) / together, float(work_W.max()) / alone)
        return least


def slowest(call: Callable[[], object]) -> float:
    """Seconds of the slowest rank; all ranks start together, after torch's threads have fallen asleep."""
    time.sleep(0.01)
    dist.barrier()
    start = time.perf_counter()
    call()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def repeat(call: Call, count: int) -> None:
    for index in range(count):
        call(index)


def compare(theirs: Call, ours: dict[str, Call], dtype: torch.dtype, what: str) -> None:
    """Raise ValueError unless all outputs are DeepSpeed's. A row in 1,000 may differ: rounding may flip a near tie."""
    expected_TD = theirs(0).float()
    for name, call in ours.items():
        error_T = (call(0).float() - expected_TD).abs().amax(1) / expected_TD.abs().max()
        wrong = int((error_T > TOLERANCE[dtype]).sum())
        if not error_T.isfinite().all() or wrong > len(error_T) // 1000:
            raise ValueError(f"{what}, {name}: {wrong} of {len(error_T)} rows are not DeepSpeed's, {error_T.max():.1e}")


def check(shape: Shape, kernels: native.Kernels) -> None:
    """Compare outputs in float32, for both load distributions and a few sizes."""
    theirs, ours = DeepSpeedSide(shape, torch.float32), OurSide(shape, torch.float32, kernels, max(CHECKED_TOKENS))
    for routing, tokens in itertools.product(ROUTINGS, CHECKED_TOKENS):
        theirs.route(routing)
        ours.route(routing)
        inputs = draw_inputs(dist.get_rank(), tokens, torch.float32)
        compare(partial(theirs.call, inputs), ours.calls(inputs), torch.float32, f"{shape}, {routing}, {tokens} tokens")


def measure(shape: Shape, options: argparse.Namespace, kernels: native.Kernels) -> Iterator[Result]:
    dtype, floor, ranks = torch.bfloat16, Floor(kernels), dist.get_world_size()
    theirs, ours = DeepSpeedSide(shape, dtype), OurSide(shape, dtype, kernels, max(options.tokens))
    for routing, tokens in itertools.product(options.routing, options.tokens):
        theirs.route(routing)
        ours.route(routing)
        inputs = draw_inputs(dist.get_rank(), tokens, dtype)
        calls = {"deepspeed": partial(theirs.call, inputs)} | ours.calls(inputs)
        compare(calls["deepspeed"], ours.calls(inputs), dtype, f"{shape}, {ranks} ranks, {routing}, {tokens} tokens")
        work = ours.work(inputs)
        counts = {name: int(max(1, min(50, options.budget / slowest(partial(c, 1))))) for name, c in calls.items()}
        samples: dict[str, list[float]] = {"floor": []} | {name: [] for name in calls}
        for _ in range(options.repetitions):
            samples["floor"].append(floor.seconds(*work))
            for name, call in calls.items():
                samples[name].append(slowest(partial(repeat, call, counts[name])) / counts[name])

        def ratio(above: str, below: str, samples: dict[str, list[float]] = samples) -> float:
            return statistics.median(a / b for a, b in zip(samples[above], samples[below], strict=True))

        middle = {name: statistics.median(values) * 1e6 for name, values in samples.items()}
        ways = [name for name in calls if name != "deepspeed"]
        yield Result(
            str(shape), routing, ranks, tokens, middle["floor"], middle["deepspeed"],
            {name: middle[name] for name in ways},
            {name: ratio("deepspeed", name) for name in ways},
            {name: ratio("floor", name) for name in ways},
        )  # fmt: skip


@torch.no_grad()  # in inference mode torch copies the weights of experts that get views, as DeepSpeed's do
def run_rank(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    """One rank's process; rank 0 writes the results to a file in `folder`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["LOCAL_RANK"] = str(rank)
    share = divide_cores(sorted(os.sched_getaffinity(0)), ranks)[rank]
    os.sched_setaffinity(0, share)
    store = dist.FileStore(f"{folder}/store-{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=PEER_TIMEOUT))
    import deepspeed

    # Compiling this op on first use takes half a minute, and nothing here calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.set_num_threads(len(share))
    kernels = loader.load()
    kernels.set_threads(len(share))
    for shape in (SHAPES[name] for name in options.shapes):
        check(shape, kernels)
        gc.collect()
        if rank == 0:
            print(f"{shape}, {ranks} rank(s): the same outputs in float32", flush=True)
        for result in () if options.check_only else measure(shape, options, kernels):
            if rank == 0:
                print(line(result), flush=True)
                with Path(folder, "results.jsonl").open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["fine", "coarse"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="tokens of each rank")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--budget", type=float, default=0.05, help="seconds of calls in a repetition, at least one call"
    )
    parser.add_argument("--check-only", action="store_true", help="compare the outputs in float32, time nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "benchmarks" / "ep_layer")
    options = parser.parse_args()

    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            mp.spawn(run_rank, (ranks, folder, options), nprocs=ranks)
        lines = Path(folder, "results.jsonl")
        if lines.exists():
            results = [Result(**json.loads(text)) for text in lines.read_text().splitlines()]
    if results:
        options.output.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(loader.load().instruction_set), "results": [asdict(r) for r in results]}
        (options.output / "results.json").write_text(json.dumps(content, indent=2) + "\n")
        (options.output / "table.md").write_text(table(results))
        draw(results, options.output / "time.png")


if __name__ == "__main__":
    main()
