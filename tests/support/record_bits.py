"""Records the exact bits that engines compute, so that two checkouts can be compared.

    python tests/support/record_bits.py record --tree CHECKOUT a.npz
    python tests/support/record_bits.py compare a.npz b.npz

`record` uses the moe_runtime of a checkout (default: this one), and tiny models of three families from a fixed seed.
It runs them on 1, 2 and 4 ranks, with native kernels and with torch, in float32 and bfloat16: whole, in chunks,
preempted, with replicas and while experts move. It saves each request's tokens and logits, and the expert counts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Names used of moe_runtime: the current module, then the module before the code moved into rooms.
PLACES = {
    "build_engine": ("moe_runtime.build:build_engine",),
    "SamplingParams": ("moe_runtime:SamplingParams",),
    "EngineConfig": ("moe_runtime.config.engine:EngineConfig", "moe_runtime.config:EngineConfig"),
    "Decoder": ("moe_runtime.layers.decoder:Decoder", "moe_runtime.models.decoder:Decoder"),
    "rank_setup": ("moe_runtime.worker.rank_setup", "moe_runtime.rank_setup"),
    "rank_main": ("moe_runtime.cluster.rank:main", "moe_runtime.rank_main:main"),
    "ProcessExecutor": (
        "moe_runtime.cluster.process_executor:ProcessExecutor",
        "moe_runtime.process_executor:ProcessExecutor",
    ),
}

SEED = 20240607
MODEL_LEN, NEW_TOKENS, BLOCK = 64, 22, 8
LENGTHS = (5, 20, 33, 40, 8, 12, 27, 1)
NUM_BEST = 20  # log-probabilities per token, the most that are allowed; they identify its row of logits
MOVE_AT, LEAST_STEPS = 4, 4  # the step at which moves begin, and the steps that must run after the first move
DEADLINE = 120.0  # seconds that the requests of an engine may take
JOBS = 2  # engines at a time; most of the time is the start of their processes

# family -> case of `tiny_models.py` and more settings, so that each family uses most of its features
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3 bias, tied", {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 7}),
    "mixtral": ("mixtral dynamic", {"sliding_window": 20}),
    "glm4_moe": ("glm4 groups", {"use_qk_norm": True}),
}
# engine -> options, and the phases run on it in turn; `kv_cache_memory_bytes` is in pages of BLOCK tokens
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "whole": ({}, ("whole", "moving")),
    "chunked": ({"max_num_batched_tokens": 7, "max_num_seqs": 5, "dispatcher": "all_gather"}, ("chunked",)),
    "preempted": ({"kv_cache_memory_bytes": MODEL_LEN // BLOCK + 1, "dispatcher": "all_to_all"}, ("preempted",)),
    "replicas": ({"redundant_experts": 1}, ("moving to replicas", "replicas")),
}
STATIC = ("whole", "chunked", "preempted")  # steps and placement do not depend on when a message arrives
SAMPLING: list[dict[str, Any]] = [  # one per length
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 0.8, "seed": 1, "ignore_eos": True},
    {"temperature": 0.0},
    {"temperature": 1.2, "seed": 2, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0, "ignore_eos": True, "routing": "top_k=1"},
    {"temperature": 1.0, "seed": 3, "min_p": 0.02, "presence_penalty": 0.6, "ignore_eos": True},
    {"temperature": 0.0, "repetition_penalty": 1.3, "ignore_eos": True},
    {"temperature": 1.5, "seed": 4, "frequency_penalty": 0.3},
]

Arrays = dict[str, np.ndarray]


def find(name: str) -> Any:
    """The object of a name in PLACES, from the checkout that is on the path."""
    for place in PLACES[name]:
        module, _, attribute = place.partition(":")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise  # the module exists, but something that it imports does not
            continue
        return getattr(found, attribute) if attribute else found
    raise ModuleNotFoundError(f"{name} is in none of {PLACES[name]}")


def require(condition: object, why: str) -> None:
    if not condition:
        raise RuntimeError(why)


@contextmanager
def hooks(kernels: str, folder: Path) -> Iterator[None]:
    """Hooks for this process and its forks: each process saves its rows of logits, with their log-probabilities, in a
    file of the folder. If `kernels` is "torch", there are no native kernels."""
    decoder, setup = find("Decoder"), find("rank_setup")
    logits, load_or_none = decoder.logits, setup.load_or_none

    def keep(*args: Any) -> torch.Tensor:
        rows_TV = logits(*args)
        with (folder / str(os.getpid())).open("ab") as file:
            file.write(torch.cat([rows_TV, rows_TV.log_softmax(dim=-1)], dim=-1).numpy().tobytes())
        return rows_TV

    decoder.logits = keep
    if kernels == "torch":
        setup.load_or_none = lambda: None
    try:
        yield
    finally:
        decoder.logits, setup.load_or_none = logits, load_or_none


def take_rows(folder: Path, vocab: int) -> dict[tuple[float, ...], np.ndarray]:
    """Rows of logits that all processes have saved since the last call, by their best log-probabilities."""
    rows: dict[tuple[float, ...], np.ndarray] = {}
    for file in folder.iterdir():
        for logits_V, logprobs_V in np.fromfile(file, np.float32).reshape(-1, 2, vocab):
            key = tuple(np.sort(logprobs_V)[: -NUM_BEST - 1 : -1].tolist())
            same = rows.setdefault(key, logits_V)
            require(same.tobytes() == logits_V.tobytes(), "two rows of logits have the same best log-probabilities")
        file.unlink()
    return rows


@dataclass(frozen=True)
class Job:
    """One engine: its settings, and the checkpoint that it runs."""

    family: str
    dtype: str
    kernels: str
    ep_size: int
    way: str
    path: Path
    page_bytes: int  # in float32

    def options(self) -> dict[str, Any]:
        options = {"dtype": self.dtype, "ep_size": self.ep_size, **WAYS[self.way][0]}
        if self.ep_size == 1:
            options.pop("dispatcher", None)
        if "kv_cache_memory_bytes" in options:
            options["kv_cache_memory_bytes"] *= self.page_bytes // (1 if self.dtype == "float32" else 2)
        return options

    def phases(self) -> list[str]:
        """The phases to run and record. Torch in bfloat16 guarantees nothing in phases that depend on timing."""
        phases = [phase for phase in WAYS[self.way][1] if self.ep_size > 1 or phase in STATIC]
        return [p for p in phases if p in STATIC or self.kernels == "native" or self.dtype == "float32"]


def run_job(job: Job) -> Arrays:
    """Start an engine, run its phases, and return the arrays to compare."""
    found: Arrays = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = (sys.executable, "-P", __file__, "ranks", job.kernels, name)
        make_executor = None if job.ep_size == 1 else partial(find("ProcessExecutor"), command=command)
        make_config = find("EngineConfig")
        # Counts are compared, so every token is computed in every phase.
        repeats = {"enable_prefix_caching": False} if hasattr(make_config, "enable_prefix_caching") else {}
        config = make_config(
            str(job.path),
            **repeats,
            skip_tokenizer_init=True,
            device="cpu",
            max_model_len=MODEL_LEN,
            block_size=BLOCK,
            step_timeout=DEADLINE,
            **job.options(),
        )
        if job.ep_size == 1:
            torch.set_num_threads(2 if job.kernels == "native" else 1)  # torch's own threads are slow on busy cores
        with hooks(job.kernels, folder) if job.ep_size == 1 else nullcontext():
            engine = find("build_engine")(config, make_executor)
            try:
                is_native = engine.health()["placement_invariance"] == "bitwise"
                require(is_native == (job.kernels == "native"), f"{job}: other kernels run than asked for")
                for phase in job.phases():
                    prefix = f"{job.family} {job.dtype} {job.kernels} ep{job.ep_size} {phase}"
                    arrays = run_phase(engine, job, phase, folder)
                    found |= {f"{prefix}, {what}": array for what, array in arrays.items()}
            finally:
                engine.close()
    return found


def run_phase(engine: Any, job: Job, phase: str, folder: Path) -> Arrays:
    """Run all requests together; their tokens and logits, and the expert counts since the engine's start.

    With replicas, or while experts move, the arrival time of reports decides which rank computes a row. Torch's sums
    then have other bits. Torch only guarantees greedy tokens in float32, so only these are recorded. Steps depend only
    on the requests, including what preempted sequences compute again. So counts are equal if choices of experts are.
    """
    is_exact = job.kernels == "native" or phase in STATIC
    deltas = play(engine, job, "moving" in phase)
    rows = take_rows(folder, engine.model_config.vocab_size)
    found: Arrays = {}
    for name, (tokens, keys) in deltas.items():
        if is_exact or SAMPLING[int(name)]["temperature"] == 0.0:
            found[f"request {name}, tokens"] = np.array(tokens)
        if is_exact:
            require(all(key in rows for key in keys), f"{job}, {phase}, request {name}: no row of logits fits a token")
            found[f"request {name}, logits"] = np.stack([rows[key] for key in keys])
    if is_exact:
        found |= {f"{kind} counts": counts_LE for kind, counts_LE in engine.expert_load().tokens.items()}
    if phase == "preempted":
        require(engine.stats().num_preemptions, f"{job}: nothing was preempted")
    if "replicas" in phase:
        placement = engine.placement()
        require((placement.slots >= 0).sum() > placement.slots.shape[0] * placement.num_experts, f"{job}: no replicas")
    return found


def play(engine: Any, job: Job, moves: bool) -> dict[str, tuple[list[int], list[tuple[float, ...]]]]:
    """Tokens of each request, and for each token the key of its row of logits; with `moves`, experts move meanwhile."""
    generator = torch.Generator().manual_seed(SEED)
    found: dict[str, tuple[list[int], list[tuple[float, ...]]]] = {}
    for index, (length, sampling) in enumerate(zip(LENGTHS, SAMPLING, strict=True)):
        prompt = torch.randint(2, engine.model_config.vocab_size, (length,), generator=generator).tolist()
        params = find("SamplingParams")(max_tokens=NEW_TOKENS, logprobs=NUM_BEST, **sampling)
        engine.add_request(str(index), prompt, params)
        found[str(index)] = ([], [])
    rebalance, version = None, engine.placement().version
    num_steps = num_after = 0
    deadline = time.monotonic() + DEADLINE
    while engine.has_work or not (rebalance is None or rebalance.done):
        require(time.monotonic() < deadline, f"{job}: requests or experts on their way do not come to an end")
        if moves and num_steps == MOVE_AT:
            rebalance = engine.rebalance()
        if rebalance is not None and not rebalance.done:
            time.sleep(0.005)  # so that moves finish while steps are running
        if not engine.has_work:
            engine.tend()
            continue
        num_after += engine.placement().version > version
        num_steps += 1
        for delta in engine.step():
            tokens, keys = found[delta.request_id]
            tokens += delta.token_ids
            for position in delta.logprobs:
                logprobs = sorted((entry.logprob for entry in position.values()), reverse=True)
                keys.append(tuple(logprobs[:NUM_BEST]))
    if rebalance is not None:
        require(rebalance.moves and not rebalance.rollbacks, f"{job}: no expert has moved")
        require(num_after >= LEAST_STEPS, f"{job}: experts moved too late, {num_after} steps before the end")
    return found


def make_jobs(folder: Path) -> tuple[list[Job], Arrays]:
    """All engines, and sums over the checkpoints, so that a changed model is not mistaken for a changed result."""
    sys.path.append(str(Path(__file__).parent))
    from tiny_models import make_model, save

    jobs, sums = [], {}
    for family, (case, settings) in MODELS.items():
        torch.manual_seed(SEED)
        model = make_model(case, **settings).bfloat16()
        path = save(model, folder / family)
        sums[f"{family}, checkpoint"] = np.array([zlib.crc32(f.read_bytes()) for f in path.glob("*.safetensors")])
        c = model.config
        page_bytes = 2 * c.num_hidden_layers * BLOCK * c.num_key_value_heads * c.head_dim * 4
        jobs += [
            Job(family, dtype, kernels, ep_size, way, path, page_bytes)
            for ep_size in (1, 2, 4)
            for kernels in ("native", "torch")
            for dtype in ("float32", "bfloat16")
            for way in WAYS
        ]
    return [job for job in jobs if job.phases()], sums


def record(tree: Path, out: Path) -> None:
    """Record with the moe_runtime of `tree`; if it is not on this process's path, restart the process with it."""
    if os.environ.get("PYTHONPATH") != str(tree):
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        jobs, arrays = make_jobs(Path(folder))
        for job in jobs:
            if job.ep_size == 1:  # in this process, where only one engine at a time can be hooked
                arrays |= run_job(job)
        with ThreadPoolExecutor(JOBS) as pool:
            for found in pool.map(run_job, [job for job in jobs if job.ep_size > 1]):
                arrays |= found
    for name, module in sys.modules.items():
        if name.split(".")[0] == "moe_runtime":
            require(Path(str(module.__file__)).is_relative_to(tree), f"{name} comes from {module.__file__}")
    np.savez(out, **arrays)  # type: ignore[arg-type]
    print(f"{len(arrays)} arrays of {len(jobs)} engines recorded from {tree} in {time.monotonic() - start:.0f} s")


def compare(a: Path, b: Path) -> int:
    """Print every difference; returns their number."""
    with np.load(a) as ours, np.load(b) as theirs:
        names = sorted({*ours.files, *theirs.files})
        differences = [line for name in names if (line := difference(name, ours, theirs)) is not None]
    require(names, "nothing was recorded")
    print(*differences, f"{len(names)} arrays compared, {len(names) - len(differences)} equal", sep="\n")
    return len(differences)


def difference(name: str, ours: Any, theirs: Any) -> str | None:
    """How an array differs, in one line; None if all bits are equal."""
    if name not in ours.files or name not in theirs.files:
        return f"{name}: only in the {'first' if name in ours.files else 'second'} file"
    a, b = ours[name], theirs[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name}: {a.dtype} {a.shape} and {b.dtype} {b.shape}"
    unequal = a.view(np.uint8).reshape(*a.shape, a.itemsize) != b.view(np.uint8).reshape(*b.shape, b.itemsize)
    where = np.argwhere(unequal.any(axis=-1))
    if not len(where):
        return None
    first = tuple(where[0].tolist())
    return f"{name}: {len(where)} of {a.size} differ, first {list(first)}: {a[first]!r} and {b[first]!r}"


def main() -> None:
    # Without this, modules missing here would come from an installed checkout.
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
    if sys.argv[1:2] == ["ranks"]:  # run the ranks of an engine; they get the rest of the command line
        _, _, kernels, folder, *sys.argv[1:] = sys.argv
        with hooks(kernels, Path(folder)):
            find("rank_main")()
        os._exit(0)  # a normal interpreter shutdown takes longer than the requests
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="run all engines and write what they give")
    recorder.add_argument("--tree", type=Path, default=Path(__file__).parents[2], help="the checkout; default this one")
    recorder.add_argument("out", type=Path, help=".npz file")
    comparer = commands.add_parser("compare", help="compare two files; exit code 1 if they differ")
    comparer.add_argument("files", type=Path, nargs=2)
    options = parser.parse_args()
    if options.command == "record":
        record(options.tree.resolve(), options.out)
    elif compare(*options.files):
        sys.exit(1)


if __name__ == "__main__":
    main()
