"""A script for a process that interprets Triton kernels: runs decode steps of one rank under `NoSync`, prints JSON.

`decode_step.py MODEL usual` compares them with ordinary steps in torch, `decode_step.py MODEL invariant` with ordinary
steps in Triton, both with `batch_invariant`. `decode_step.py MODEL int4` is `usual` with weights quantised by the
method `int4`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import row_products
import torch
import triton
from no_sync import NoSync

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.quantization import METHODS, PARTS, quantized
from moe_runtime.engine.page_pool import RankPages
from moe_runtime.kernels import ops
from moe_runtime.memory.page_group import page_groups
from moe_runtime.models.registry import read_model_config
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.messages import PADDED, Chunk, NewSequence, RankPlan, RankStep
from moe_runtime.worker import decode_graphs, worker
from moe_runtime.worker.step_samples import sample_step

BLOCK, STEPS = 8, 4
PROMPTS = [[3, 4, 5], [7] * 17, [9, 8, 2, 1, 6, 4]]


class Capture:
    """Repeats the call under `NoSync`, which proves that it never waits for the device."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.calls += 1
            with NoSync():
                run()

        return replay


def best(logits_BV: torch.Tensor) -> list[int]:
    return logits_BV.argmax(dim=-1).tolist()


def run(path: Path, bucket: int, kind: str) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens of each prompt, and the logits of every decode step; steps use the bucket, or are ordinary if it is 0."""
    options: dict[str, Any] = {"max_num_seqs": 4, "block_size": BLOCK, "max_model_len": 64}
    config = EngineConfig(str(path), dtype="float32", **options, batch_invariant=kind == "invariant")
    model = quantized(read_model_config(path), kind if kind in METHODS else None, ",".join(PARTS), None)
    rank = worker.Worker(config, model, path)
    pages = RankPages(page_groups(config, model), rank.info.num_pages)
    held = [pages.hold() for _ in PROMPTS]
    params = SamplingParams(temperature=0.0)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    logits = []
    for step in range(STEPS):
        chunks = []
        for seq_id, prompt in enumerate(PROMPTS):
            start = 0 if step == 0 else len(prompt) + step - 1
            end = len(prompt) + step
            new_pages = pages.extend(held[seq_id], start, end - start)
            chunks.append(Chunk(seq_id, start, end - start, new_pages, True))
        new = [NewSequence(i, list(p), len(p), params, 0) for i, p in enumerate(PROMPTS)] if step == 0 else []
        chunks.sort(key=lambda chunk: chunk.num_tokens != 1)
        work = RankPlan(new, [], chunks, num_decode=len(chunks) if step else 0)
        named = bucket if step else 0
        plan = RankStep(step, PADDED if named else "local", [work.num_tokens], bucket=named, work=work)
        with torch.inference_mode():
            prepared = rank.prepare(plan)
            hidden_TD = rank.launch(prepared)()
            logits.append(rank.model.logits(hidden_TD))
            for sample in sample_step(prepared, hidden_TD, rank.model, best, ()):
                tokens[sample.seq_id].append(sample.token_id)
    return tokens, logits[1:]


def launches() -> list[str]:
    """A list that receives the names of all kernels launched from now on."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    launch = InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return launch(self, *args, **kwargs)

    InterpretedFunction.run = noted
    return names


def main() -> None:
    path = Path(sys.argv[1])
    assert triton.knobs.runtime.interpret
    row_products.use_in_this_process()
    worker.native_kernels = lambda device, group: None
    kind = sys.argv[2]
    if kind == "invariant":
        ops.uses_triton = lambda device: True
    ordinary_tokens, ordinary = run(path, 0, kind)
    capture, kernels = Capture(), launches()
    ops.uses_triton = lambda device: True
    worker.capture_on = lambda device: capture
    decode_graphs.SHORTEST_CONTEXT = 16
    tokens, logits = run(path, 4, kind)
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(logits, ordinary, strict=True))
    json.dump(
        {
            "tokens": tokens,
            "ordinary tokens": ordinary_tokens,
            "largest difference": difference,
            "captured steps": capture.calls,
            "kernels": sorted(set(kernels)),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
