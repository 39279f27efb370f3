"""Logits of GGUF files and of their checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from engines import Pools
from parity_ranks import gather, plan_steps, run_steps

from moe_runtime.kernels.cpu.library import can_have_kernels

PROMPTS = [[5, 8, 13, 21, 34, 55, 2, 89, 3], [7], list(range(2, 40))]


def logits(rank_pool: Pools, path: Path) -> list[torch.Tensor]:
    plan = plan_steps(PROMPTS, [0] * 3, 1, [[len(prompt)] for prompt in PROMPTS])
    return gather(rank_pool(1).run(run_steps, path, "float32", plan, can_have_kernels()), len(PROMPTS))
