"""Loads the engines, checks them against each other, and measures in turn each engine and the machine's floor."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from make_bench_model import ensure_bench_model, ensure_gguf

from moe_runtime.config.quantization import METHODS
from moe_runtime.types.weight_format import Code
from peers import check
from peers.drivers import SCRIPTS, Driver
from peers.environments import ensure_environment
from peers.floor import BYTES, Rates, Routing, decode_step_seconds, prefill_seconds
from peers.report import agreement_table
from peers.sizes import Sizes

OURS = ("ours", "ours-ep2")
# Beside "ours" in a run with quantised weights: rows in int8, and weights that are not quantised.
OURS_QUANTIZED = ("ours-int8-rows", "ours-bf16")
GGUF_KINDS = {None: "bf16", "int8": "q8_0", "int4": "q4_0"}
PEERS = ("llama.cpp", "vllm", "transformers")
CHECK_PROMPTS, CHECK_LENGTH = 2, 192  # longer than a window of `bench-gpt-oss`
WARM_UP_TOKENS = 3
# Keeps our kernels, torch and oneDNN from using what is newer than AVX2; llama.cpp is compiled without it.
AVX2_VARIABLES = {
    "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent / "tests" / "support" / "forced_kernels")]),
    "MOE_RUNTIME_TEST_KERNELS": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
ANSWER_DEADLINE_S = 1200.0  # engines that compile take minutes to load the first time


class DisagreementError(RuntimeError):
    """Not all engines hold the same weights; the message has the figures."""


@dataclass(frozen=True)
class Case:
    """A number of prompts of one length, and tokens to generate for each; 1 token is prefill only."""

    batch: int
    length: int
    new_tokens: int

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.length}"


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        shape: a name in `make_bench_model.SHAPES`.
        together: groups of engines that are loaded at the same time and measured in turn; groups run one by one.
        logs: folder for the engines' output.
        absent: engines that were asked for but do not run the model, and why.
        avx2: no engine uses instructions beyond AVX2.
        quantization: "int8" or "int4" of experts, attention and head, or None; llama.cpp has Q8_0 or Q4_0 then.
    """

    shape: str
    cases: tuple[Case, ...]
    together: tuple[tuple[str, ...], ...]
    repetitions: int
    logs: Path
    absent: dict[str, str] = field(default_factory=dict)
    avx2: bool = False
    quantization: str | None = None

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(itertools.chain(*self.together))


class Conductor:
    """One run of a plan. `run` returns all measurements, as plain values for JSON."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model = ensure_bench_model(plan.shape)
        self.config = json.loads((self.model / "config.json").read_text())
        self.sizes = Sizes.of(self.config)
        self.threads = len(os.sched_getaffinity(0))
        self.routing: dict[str, Any] = {}
        self.trials: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Measure.

        Raises:
            DriverError: an engine failed.
            DisagreementError: an engine's log-probabilities differ from the reference.
        """
        if "llama.cpp" in self.plan.engines:
            ensure_gguf(self.model, GGUF_KINDS[self.plan.quantization])
        reference = self._reference() if set(self.plan.engines) & set(PEERS) else None
        info, agreement = {}, {}
        with self._start("machine") as machine:
            for group in self.plan.together:
                with ExitStack() as stack:
                    drivers = {name: self._load(stack, name) for name in group}
                    info |= {name: driver.call("info") for name, driver in drivers.items()}
                    if reference is not None:
                        agreement |= self._agreement(drivers, reference)
                    self._warm_up(drivers)
                    self._measure(drivers, machine)
        return {
            "shape": self.plan.shape,
            "config": self.config,
            "threads": self.threads,
            "cases": [asdict(case) for case in self.plan.cases],
            "engines": list(self.plan.engines),
            "absent": self.plan.absent,
            "avx2": self.plan.avx2,
            "quantization": self.plan.quantization,
            "repetitions": self.plan.repetitions,
            "info": info,
            "agreement": agreement,
            "routing": self.routing,
            "transformers_trials": self.trials,
            "samples": self.samples,
        }

    def _start(self, name: str) -> Driver:
        """Start an engine's process; its first answer means that it is ready."""
        module, arguments, variables = self._command(name)
        # transformers' environment serves the reference as well.
        home = "transformers" if name == "reference" else name
        python = ensure_environment(self._environment(home)) if home in PEERS else Path(sys.executable)
        self.plan.logs.mkdir(parents=True, exist_ok=True)
        return Driver(
            name,
            python,
            module,
            arguments,
            environment=variables | (AVX2_VARIABLES if self.plan.avx2 else {}),
            log=self.plan.logs / f"{name}.log",
            deadline_s=ANSWER_DEADLINE_S,
        )

    def _environment(self, home: str) -> str:
        """The environment of a peer: how llama.cpp is compiled depends on what it is to run."""
        if home != "llama.cpp":
            return home
        return "llama.cpp-avx2" if self.plan.avx2 else "llama.cpp-no-amx" if self.plan.quantization else home

    def _command(self, name: str) -> tuple[str, list[str], dict[str, str]]:
        """Module, arguments and environment variables of an engine."""
        model, threads = str(self.model), str(self.threads)
        sequences = str(max(case.batch for case in self.plan.cases))
        length = str(max(case.length + case.new_tokens for case in self.plan.cases))
        weights = "dummy" if self.plan.shape == "olmoe" else "auto"
        quantized = [] if self.plan.quantization is None else ["--quantization", self.plan.quantization]

        def ours(ep_size: int, *options: str) -> tuple[str, list[str], dict[str, str]]:
            return "peers.ours_engine", [model, str(ep_size), weights, sequences, length, *options], {}

        gguf = self.model / f"model-{GGUF_KINDS[self.plan.quantization]}.gguf"
        return {
            "ours": ours(1, *quantized),
            "ours-ep2": ours(2, *quantized),
            "ours-int8-rows": ours(1, *quantized, "--activation-quantization", "int8"),
            "ours-bf16": ours(1),
            "llama.cpp": ("peers.llamacpp_engine", [str(gguf), threads], {}),
            "vllm": ("peers.vllm_engine", [model, sequences, length], vllm_variables()),
            "transformers": ("peers.hf_engine", [model, "bfloat16"], {"HF_HUB_OFFLINE": "1"}),
            "reference": ("peers.hf_engine", [model, "float32"], {"HF_HUB_OFFLINE": "1"}),
            "machine": ("peers.machine", [threads], {}),
        }[name]

    def _load(self, stack: ExitStack, name: str) -> Driver:
        start = time.monotonic()
        driver = stack.enter_context(self._start(name))
        driver.call("info")
        say(f"{name} is loaded ({time.monotonic() - start:.0f} s with its imports)")
        return driver

    def _reference(self) -> np.ndarray:
        """Log-probabilities of all tokens in float32, `[prompts, positions, V]`."""
        say("the reference: transformers in float32")
        path = self.plan.logs / "reference.npy"
        with self._start("reference") as driver:
            driver.call("all_logprobs", prompts=self._check_prompts(), path=str(path.resolve()))
        found: np.ndarray = np.load(path)
        path.unlink()
        return found

    def _check_prompts(self) -> list[list[int]]:
        return self._prompts("check", CHECK_PROMPTS, CHECK_LENGTH)

    def _agreement(self, drivers: dict[str, Driver], reference_PTV: np.ndarray) -> dict[str, Any]:
        found = {}
        for name, driver in drivers.items():
            answer = driver.call("logprobs", prompts=self._check_prompts(), top=check.TOP)
            quantization = None if name == "ours-bf16" else self.plan.quantization
            limit = check.MAX_QUANTIZED_KL[quantization] if quantization else check.MAX_MEAN_KL
            agreement = check.compare(reference_PTV, answer, limit)
            found[name] = asdict(agreement) | {"agrees": agreement.agrees}
            say(f"{name}: mean KL to the reference {agreement.mean_kl:.5f}")
        if not all(entry["agrees"] for entry in found.values()):
            raise DisagreementError(f"the engines do not hold the same weights:\n{agreement_table(found)}")
        return found

    def _warm_up(self, drivers: dict[str, Driver]) -> None:
        for case in self.plan.cases:
            prompts = self._prompts("warm-up", case.batch, case.length)
            for name, driver in drivers.items():
                say(f"warming up {name}, {case.name}")
                if name == "transformers":
                    self.trials[case.name] = driver.call("trial", prompts=prompts)
                else:
                    driver.call("generate", prompts=prompts, new_tokens=min(WARM_UP_TOKENS, case.new_tokens))
            if "ours" in drivers:
                routing = drivers["ours"].call("routing", prompts=prompts, new_tokens=case.new_tokens)
                self.routing[case.name] = routing

    def _measure(self, drivers: dict[str, Driver], machine: Driver) -> None:
        total = self.plan.repetitions * len(self.plan.cases) * len(drivers)
        count = itertools.count(1)
        before = machine.call("measure")
        for repetition in range(self.plan.repetitions):
            names = list(drivers)
            names = names[repetition % len(names) :] + names[: repetition % len(names)]  # no engine is always first
            for case in self.plan.cases:
                prompts = self._prompts(f"repetition {repetition}", case.batch, case.length)
                for name in names:
                    seconds = drivers[name].call("generate", prompts=prompts, new_tokens=case.new_tokens)
                    after = machine.call("measure")
                    added = self._sample(repetition, case, name, seconds, Rates.mean(before, after))
                    before = after
                    rates = ", ".join(
                        f"{s['phase']} {s['tokens_per_s']:.0f} tok/s ({s['of_floor']:.0%} of the floor)" for s in added
                    )
                    say(f"{next(count)}/{total}: {case.name}, {name}: {rates}")

    def _sample(
        self, repetition: int, case: Case, name: str, seconds: dict[str, float], rates: Rates
    ) -> list[dict[str, Any]]:
        ranks = 2 if name == "ours-ep2" else 1
        weight_bytes = stored_bytes(name, self.plan.quantization)
        routing = self.routing[case.name][str(ranks)]
        touched = {phase: Routing(**routing[phase]) for phase in ("prefill", "decode") if phase in routing}
        floor = prefill_seconds(
            self.sizes,
            rates,
            touched["prefill"],
            Routing(**routing["rows"]),
            batch=case.batch,
            length=case.length,
            ranks=ranks,
            weight_bytes=weight_bytes,
        )
        found = [("prefill", case.batch * case.length, seconds["prefill_s"], case.batch * case.length / floor)]
        if case.new_tokens > 1:
            # In the first of these steps a token sees the prompt and itself, in the last new_tokens - 2 more.
            context = case.length + case.new_tokens / 2
            step = decode_step_seconds(
                self.sizes,
                rates,
                touched["decode"],
                batch=case.batch,
                context=context,
                ranks=ranks,
                weight_bytes=weight_bytes,
            )
            found.append(("decode", seconds["decode_tokens"], seconds["decode_s"], case.batch / step))
        added = [
            {
                "repetition": repetition,
                "case": case.name,
                "engine": name,
                "phase": phase,
                "tokens": tokens,
                "seconds": spent,
                "tokens_per_s": tokens / spent,
                "floor_tokens_per_s": floor_rate,
                "of_floor": tokens / spent / floor_rate,
                "rates": asdict(rates),
            }
            for phase, tokens, spent, floor_rate in found
        ]
        self.samples += added
        return added

    def _prompts(self, seed: str, batch: int, length: int) -> list[list[int]]:
        return random_prompts(seed, batch, length, self.config["vocab_size"])


def random_prompts(seed: str, batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random tokens, the same for all engines; another seed gives other prompts."""
    source = random.Random(f"{seed}/{batch}/{length}")
    return [[source.randrange(vocab_size) for _ in range(length)] for _ in range(batch)]


def stored_bytes(engine: str, quantization: str | None) -> float:
    """Bytes of a weight as an engine stores it."""
    if quantization is None or engine == "ours-bf16":
        return Code.CODED_BFLOAT16.bits / 8 if engine.startswith("ours") else BYTES
    if engine.startswith("ours"):
        return METHODS[quantization].nbytes(64, 1024, native=True) / (64 * 1024)
    return {"int8": 34, "int4": 18}[quantization] / 32  # of Q8_0 and Q4_0


def vllm_variables() -> dict[str, str]:
    """All cores for the model (vLLM's default leaves one for its scheduler), and a gibibyte for keys and values."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def say(text: str) -> None:
    """Print a line of progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
