"""A rank without torch or a model, for tests of the processes around it; `python fake_rank.py` instead of the worker.

A test controls it by a list of `rank:command`, with the commands of `_obey`. The list is in the plan's `dispatcher` or,
during loading, in the configuration's `model`. The samples show which plan the rank got.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from moe_runtime.cluster.rank import RankArguments, run_rank
from moe_runtime.config.attention import AttentionConfig
from moe_runtime.config.model import ModelConfig, MoEConfig, RopeConfig, layers_alike
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.executor import RankInfo
from moe_runtime.wire.messages import (
    NewSequence,
    RankPlan,
    RankResult,
    RankStep,
    Sample,
    SlotReport,
    SlotTask,
    StepPlan,
)
from moe_runtime.wire.transport import Init

COMMAND = (sys.executable, "-P", str(Path(__file__).resolve()))
REFUSAL = "model-00001-of-00002.safetensors: the file is truncated"


class FakeWorker:
    def __init__(self, seat: RankArguments, init: Init) -> None:
        assert "torch" not in sys.modules
        self.rank = seat.rank
        self.num_ranks = init.num_ranks
        self.steps: list[int] = []
        _obey(init.config.model, self.rank)
        threads = int(os.environ["OMP_NUM_THREADS"])
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        self.info = RankInfo(
            self.rank,
            os.getpid(),
            "cpu",
            "float32",
            threads,
            (8,),
            0,
            "float32",
            0,
            0.0,
            {"cores": cores},
            False,
            ("all_gather",),
        )

    def step(self, step: RankStep) -> RankResult:
        assert len(step.tokens_per_rank) == self.num_ranks
        self.steps.append(step.step)
        _obey(step.dispatcher, self.rank)
        samples = [Sample(new.seq_id, fingerprint(new)) for new in step.work.new_sequences]
        return RankResult(step.step, self.rank, samples)

    def run_task(self, task: SlotTask) -> SlotReport:
        return SlotReport(self.rank, task.task_id, True, 0, 0.0, task.slot + self.rank)

    def forget(self) -> None:
        self.steps.clear()

    def expert_counts(self) -> np.ndarray:
        return np.full((2, 3, 4), 10**self.rank, dtype=np.int64) * len(self.steps)


def fingerprint(new: NewSequence) -> int:
    """A number that depends on what the sequence carries."""
    return sum(new.token_ids) + new.seed + len(new.params.stop)


def _obey(commands: str, rank: int) -> None:
    for part in commands.split(","):
        target, _, command = part.partition(":")
        if target != str(rank):
            continue
        match command:
            case "late":
                time.sleep(0.3)
            case "hang":
                time.sleep(3600)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "refuse":
                raise ValueError(REFUSAL)
            case "raise":
                raise RuntimeError("connection closed by peer")
            case _:
                raise AssertionError(command)


def model_config() -> ModelConfig:
    """An arbitrary model configuration."""
    return ModelConfig(
        family="fake",
        vocab_size=10,
        hidden_size=4,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        rope=RopeConfig(theta=10000.0, rotary_dim=4),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=4),
        layers=layers_alike(1, AttentionConfig(1, 1, 4), (0,), 4),
        tie_word_embeddings=True,
        dtype="float32",
        eos_token_ids=(0,),
    )


def step_plan(step: int, num_ranks: int, commands: str = "") -> StepPlan:
    """A step with one new sequence per rank, whose id is the rank."""
    ranks = [
        RankPlan(new_sequences=[NewSequence(rank, [step, rank], 2, SamplingParams(stop=["a", "b"]), seed=100 * rank)])
        for rank in range(num_ranks)
    ]
    return StepPlan(step, commands, [2] * num_ranks, ranks=ranks)


if __name__ == "__main__":
    run_rank(FakeWorker)
