"""Engines that compute the logits of whole texts. Shape suffixes: T tokens, V vocabulary."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from peers.drivers import Driver
from torch import Tensor

from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.page_pool import RankPages
from moe_runtime.memory.page_group import page_groups
from moe_runtime.models.registry import read_stored_config
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.weights.checkpoint import resolve_model
from moe_runtime.wire.messages import Chunk, NewSequence, RankPlan, StepPlan
from moe_runtime.worker.worker import Worker

DEADLINE_S = 300.0


class Reader:
    """A single rank of the runtime. Texts are at most `config.max_model_len` tokens long."""

    def __init__(self, config: EngineConfig) -> None:
        path = resolve_model(config.model)
        self._config = config
        self._model_config = config.quantized(read_stored_config(path))
        self._worker = Worker(config, self._model_config, path)
        self._num_read = 0

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """`[T, V]` in float32. The text is read in two chunks, so the second one reads keys from the cache."""
        pages = RankPages(page_groups(self._config, self._model_config), self._worker.info.num_pages)
        held, rows, half = pages.hold(), [], len(tokens) // 2
        dropped = [self._num_read] if self._num_read else []
        self._num_read += 1
        new = [NewSequence(self._num_read, tokens, len(tokens), SamplingParams(), seed=0)]
        for start, count in ((0, half), (half, len(tokens) - half)):
            chunk = Chunk(self._num_read, start, count, pages.extend(held, start, count), sample=False)
            work = RankPlan([], [], [chunk]) if start else RankPlan(new, dropped, [chunk])
            step = self._worker.prepare(StepPlan(0, "local", [count], ranks=[work]).of_rank(0))
            rows.append(self._worker.model.logits(self._worker.launch(step)()).float())
        return torch.cat(rows)


class LlamaCppReader:
    """llama.cpp with a GGUF file, in a process of its own. Its cache is in float16, as its users have it.

    Args:
        python: of the environment that `peers.environments` makes.
        folder: for logits on their way, and for the log.
    """

    def __init__(self, python: Path, gguf: Path, folder: Path) -> None:
        self._logits = folder / "logits.npy"
        self._driver = Driver(
            "llama.cpp",
            python,
            "peers.llamacpp_engine",
            [str(gguf), str(len(os.sched_getaffinity(0)))],
            environment={},
            log=folder / "llama.cpp.log",
            deadline_s=DEADLINE_S,
        )

    def logits(self, tokens: list[int]) -> Tensor:
        """`[T, V]` in float32."""
        self._driver.call("write_logits", prompt=tokens, file=str(self._logits))
        return torch.from_numpy(np.load(self._logits))

    def close(self) -> None:
        self._driver.close()
