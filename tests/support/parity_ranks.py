"""What the parity tests run on every rank of a pool; here, as a rank's process imports it by name."""

from __future__ import annotations

from pathlib import Path

import torch
from rank_pool import RankContext
from torch import Tensor

from moe_runtime.config import EngineConfig
from moe_runtime.messages import StepPlan
from moe_runtime.models import load_model_config
from moe_runtime.worker import Worker

BLOCK = 8


def run_steps(
    context: RankContext, path: Path, dtype: str, steps: list[StepPlan], model_len: int
) -> dict[int, list[Tensor]]:
    """Logits of every token of every sequence of this rank, in order."""
    config = EngineConfig(
        model=str(path), dtype=dtype, max_num_seqs=16, block_size=BLOCK, max_model_len=model_len, device="cpu"
    )
    group = context.group if context.num_ranks > 1 else None
    worker = Worker(config, load_model_config(path), path, rank=context.rank, num_ranks=context.num_ranks, group=group)
    logits: dict[int, list[Tensor]] = {}
    with torch.inference_mode():
        for plan in steps:
            work = plan.ranks[context.rank]
            worker._admit(work)
            rows = worker.model.logits(worker.model.forward(worker._batch(work, plan), worker.cache))
            for chunk, part in zip(work.chunks, rows.split([c.num_tokens for c in work.chunks]), strict=True):
                logits.setdefault(chunk.seq_id, []).append(part)
    return logits
