"""Plans of the parity tests, and what they run on every rank of a pool; a module, since ranks import it by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_pool import RankContext
from torch import Tensor

import moe_runtime.memory.budget
import moe_runtime.worker.rank_setup
from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.page_pool import HeldPages, RankPages
from moe_runtime.memory.page_group import page_groups
from moe_runtime.models.registry import read_model_config
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.messages import Chunk, NewSequence, RankPlan, StepPlan
from moe_runtime.worker.worker import Worker

BLOCK = 8
MODEL_LEN = 12 * BLOCK
MAX_SEQUENCES = 40
GREEDY = SamplingParams(temperature=0.0)


def plan_steps(
    prompts: list[list[int]],
    ranks: list[int],
    num_ranks: int,
    cuts: list[list[int]],
    dispatchers: tuple[str, ...] = ("all_to_all", "all_gather", "symmetric"),
) -> list[StepPlan]:
    """Plans that run each prompt in pieces that end at its `cuts`; sequence i lives on rank `ranks[i]`.

    Steps of several ranks take the dispatchers in turn. `run_steps` adds the pages.
    """
    steps = []
    for step in range(max(map(len, cuts))):
        work = [RankPlan([], [], []) for _ in range(num_ranks)]
        for seq_id, (prompt, rank, ends) in enumerate(zip(prompts, ranks, cuts, strict=True)):
            if step >= len(ends):
                continue
            if step == 0:
                work[rank].new_sequences.append(NewSequence(seq_id, prompt, len(prompt), GREEDY, 0))
            start = ends[step - 1] if step else 0
            work[rank].chunks.append(Chunk(seq_id, start, ends[step] - start, [], False))
        for part in work:
            part.chunks.sort(key=lambda chunk: chunk.num_tokens != 1)
        tokens = [part.num_tokens for part in work]
        dispatcher = "local" if num_ranks == 1 else dispatchers[step % len(dispatchers)]
        steps.append(StepPlan(step, dispatcher, tokens, ranks=work))
    return steps


def run_steps(
    context: RankContext,
    path: Path,
    dtype: str,
    steps: list[StepPlan],
    native: bool,
    batch_invariant: bool = False,
    kv_cache_dtype: str = "auto",
) -> dict[int, list[Tensor]]:
    """Logits of every token of every sequence of this rank, in order, with native kernels or with torch."""
    config = EngineConfig(
        model=str(path),
        dtype=dtype,
        max_num_seqs=MAX_SEQUENCES,
        block_size=BLOCK,
        max_model_len=MODEL_LEN,
        max_num_batched_tokens=MAX_SEQUENCES * MODEL_LEN,
        device="cpu",
        batch_invariant=batch_invariant,
        kv_cache_dtype=kv_cache_dtype,
    )
    logits: dict[int, list[Tensor]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_runtime.memory.budget, "EXPERT_ROWS", 8)  # so that sparse layers process large steps in parts
        if not native:
            patch.setattr(moe_runtime.worker.rank_setup, "load_or_none", lambda: None)
        model = read_model_config(path)
        worker = Worker(
            config,
            model,
            path,
            rank=context.rank,
            num_ranks=context.num_ranks,
            group=context.group if context.num_ranks > 1 else None,
            local_ranks=context.num_ranks,
        )
        assert worker.info.batch_invariant == (native or batch_invariant)
        with torch.inference_mode():
            pages = RankPages(page_groups(config, model), worker.info.num_pages)
            held: dict[int, list[HeldPages]] = {}
            for plan in steps:
                step = plan.of_rank(context.rank)
                work = step.work
                for chunk in work.chunks:
                    mine = held.setdefault(chunk.seq_id, pages.hold())
                    chunk.new_pages[:] = pages.extend(mine, chunk.start, chunk.num_tokens)
                rows = worker.model.logits(worker.launch(worker.prepare(step))())
                for chunk, part in zip(work.chunks, rows.split([c.num_tokens for c in work.chunks]), strict=True):
                    logits.setdefault(chunk.seq_id, []).append(part)
    return logits


def gather(results: list[dict[int, list[Tensor]]], count: int) -> list[Tensor]:
    """Logits of each of `count` sequences, from the results of `run_steps` on each rank."""
    merged = {seq_id: torch.cat(parts) for part in results for seq_id, parts in part.items()}
    return [merged[seq_id] for seq_id in range(count)]
