"""Measures one model: the engines take turns, and each is loaded for its turn alone."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers.check import TOP
from peers.conductor import ANSWER_DEADLINE_S, WARM_UP_TOKENS, Case, random_prompts, say
from peers.drivers import Driver, DriverError
from peers.environments import ensure_environment
from peers.ours_engine import config_of

from big_models.memory import RankMemory, planned
from big_models.models import BigModel

CASES = (*(Case(batch, 64, 32) for batch in (1, 4, 16)), Case(1, 512, 1))
# Ranks, and options of `peers.ours_engine`.
OURS = {
    "ours": ("1",),
    "ours-int8-rows": ("1", "--activation-quantization", "int8"),
    "ours-ep2": ("2",),
}
ENGINES = ("ours", "llama.cpp", "ours-int8-rows", "ours-ep2")  # in the order of their turns


class Runs:
    """The runs of one model.

    Args:
        file: its GGUF file.
        engines: some of `ENGINES`.
        repetitions: turns of each engine.
        logs: folder for the engines' output.
    """

    def __init__(self, model: BigModel, file: Path, engines: list[str], repetitions: int, logs: Path) -> None:
        self.model, self.file, self.logs = model, file, logs
        self.engines, self.repetitions = [name for name in ENGINES if name in engines], repetitions
        self.threads = len(os.sched_getaffinity(0))
        self.samples: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.loads: list[dict[str, Any]] = []
        self.info: dict[str, Any] = {}
        self.absent: dict[str, str] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.experts_used: float | None = None

    def run(self) -> dict[str, Any]:
        """Measure, and return all figures as plain values for JSON.

        Raises:
            DriverError: an engine failed, or its log-probabilities are not finite.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        for repetition in range(self.repetitions):
            for name in self.engines:
                self._turn(repetition, name)
        return {
            "model": self.model.name,
            "config": self.model.config,
            "file_bytes": self.file.stat().st_size,
            "threads": self.threads,
            "cases": [asdict(case) for case in CASES],
            "engines": self.engines,
            "absent": self.absent,
            "repetitions": self.repetitions,
            "info": self.info,
            "experts_used": self.experts_used,
            "differences": self._differences(),
            "loads": self.loads,
            "memory": self.memory,
            "samples": self.samples,
        }

    def _turn(self, repetition: int, name: str) -> None:
        """Load an engine, measure all cases, end it."""
        planned_bytes = []
        if name in OURS:
            budget = planned(config_of(self._our_arguments(name)))
            if not budget.fits:
                self.absent[name] = str(budget)
                say(f"{name} is left out: {budget}")
                return
            planned_bytes = [rank.total for rank in budget.ranks]
        start = time.monotonic()
        with self._start(name) as driver:
            self.info[name] = info = driver.call("info")
            seconds = time.monotonic() - start
            self.loads.append({"repetition": repetition, "engine": name, "seconds": seconds})
            say(f"{name} is loaded ({seconds:.0f} s with its imports)")
            ranks = [RankMemory(*pair) for pair in zip(info.pop("pids", []), planned_bytes, strict=True)]
            if repetition == 0:
                self._check(name, driver)
            for case in CASES:
                self._measure(repetition, name, case, driver)
            for number, rank in enumerate(ranks):
                rank.finish()
                entry = {"repetition": repetition, "engine": name, "rank": number, **asdict(rank), "ratio": rank.ratio}
                self.memory.append(entry)
                say(f"{name}, rank {number}: at most {rank.ratio:.3f} of the planned {rank.planned / 1e9:.2f} GB")

    def _start(self, name: str) -> Driver:
        module, arguments, python = "peers.ours_engine", [], Path(sys.executable)
        if name in OURS:
            arguments = self._our_arguments(name)
        else:
            module, arguments = "peers.llamacpp_engine", [str(self.file), str(self.threads)]
            python = ensure_environment("llama.cpp-no-amx")
        log = self.logs / f"{self.model.name}-{name}.log"
        return Driver(name, python, module, arguments, environment={}, log=log, deadline_s=ANSWER_DEADLINE_S)

    def _our_arguments(self, name: str) -> list[str]:
        ranks, *options = OURS[name]
        sequences = max(case.batch for case in CASES)
        length = max(case.length + case.new_tokens for case in CASES)
        return [str(self.file), ranks, "auto", str(sequences), str(length), *options]

    def _check(self, name: str, driver: Driver) -> None:
        """Note the log-probabilities of a prompt's own tokens, and how many experts a long prompt uses."""
        prompt = self._prompts("check", Case(1, 64, 1))
        (positions,) = driver.call("logprobs", prompts=prompt, top=TOP)
        own = [
            dict(zip(*position, strict=True))[token] for token, position in zip(prompt[0][1:], positions, strict=True)
        ]
        if not all(map(math.isfinite, own)):
            raise DriverError(f"{name}: log-probabilities are not finite")
        self.logprobs[name] = own
        if name == "ours":
            routing = driver.call("routing", prompts=self._prompts("check", CASES[-1]), new_tokens=1)
            self.experts_used = routing["1"]["prefill"]["total"] / self.model.config["num_hidden_layers"]

    def _measure(self, repetition: int, name: str, case: Case, driver: Driver) -> None:
        warm_up = min(WARM_UP_TOKENS, case.new_tokens)
        driver.call("generate", prompts=self._prompts("warm-up", case), new_tokens=warm_up)
        prompts = self._prompts(f"repetition {repetition}", case)
        seconds = driver.call("generate", prompts=prompts, new_tokens=case.new_tokens)
        if case.new_tokens > 1:
            phase, tokens, spent = "decode", seconds["decode_tokens"], seconds["decode_s"]
        else:
            phase, tokens, spent = "prefill", case.batch * case.length, seconds["prefill_s"]
        say(f"{case.name}, {name}: {phase} {tokens / spent:.1f} tok/s")
        sample = {"repetition": repetition, "engine": name, "case": case.name, "phase": phase}
        self.samples.append(sample | {"tokens": tokens, "seconds": spent, "tokens_per_s": tokens / spent})

    def _prompts(self, seed: str, case: Case) -> list[list[int]]:
        return random_prompts(seed, case.batch, case.length, self.model.config["vocab_size"])

    def _differences(self) -> dict[str, float]:
        """Root mean square differences of the log-probabilities to those of the first engine."""
        first = next(iter(self.logprobs.values()), [])
        return {
            name: math.sqrt(sum((a - b) ** 2 for a, b in zip(first, own, strict=True)) / len(own))
            for name, own in list(self.logprobs.items())[1:]
        }
