"""One rank: its share of the model, its pages, its sequences. Runs the steps that it is given.

In a process of its own, which `python -m moe_runtime.worker` forks, or in the caller's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moe_runtime.batch import Batch, StepLimits, StepRouting
from moe_runtime.capacity import Limits, step_limits, with_limits
from moe_runtime.config import EngineConfig, ModelConfig
from moe_runtime.decode_graphs import DecodeGraphs, StepRows, capture_on
from moe_runtime.executor import RankInfo
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.cpu.pages import giving_memory_back
from moe_runtime.kv_cache import KVCache, choose_num_blocks
from moe_runtime.layers import TorchKit
from moe_runtime.messages import (
    Chunk,
    ExpertWork,
    PromptLogprobs,
    RankPlan,
    RankResult,
    Sample,
    SlotReport,
    SlotTask,
    StepPlan,
    TokenLogprobs,
)
from moe_runtime.model_size import weights_dtype
from moe_runtime.models.loader import Kit, ModelLoader
from moe_runtime.moe import ExpertCounter
from moe_runtime.native_kit import NativeKit
from moe_runtime.placements import initial_placement, slots_per_rank
from moe_runtime.rank_setup import choose_device, choose_dispatchers, native_kernels
from moe_runtime.sampler import SamplingRow, sample, token_logprobs
from moe_runtime.sampling_params import SamplingParams
from moe_runtime.scheduler import buckets_of
from moe_runtime.slot_tasks import SlotTasks
from moe_runtime.step_routing import routed_experts, step_routing
from moe_runtime.weights import RandomWeights, WeightSource, open_weights

PROMPT_LOGPROB_ROWS = 256  # rows of logits at a time, so that long prompts do not take gigabytes


@dataclass
class Sequence:
    """A sequence that lives on this rank: all its tokens so far and the pages that hold its keys and values."""

    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    blocks: list[int]


class Worker:
    """Loads one rank's weights, reserves its pages and runs step plans.

    Args:
        config, model_config: what the user asked for and what the checkpoint is.
        path: directory of the checkpoint.
        rank, num_ranks: this rank among all.
        group: the process group of all ranks; None for a single rank.
        local_ranks: ranks on this host, which share its memory.

    Raises:
        ValueError: the checkpoint or the options are wrong; one line says how.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        path: Path,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        group: dist.ProcessGroup | None = None,
        local_ranks: int = 1,
    ) -> None:
        start = time.perf_counter()
        self.config = config
        self._model_config = model_config
        self.rank = rank
        self.device = choose_device(config.device, rank % local_ranks)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton and NCCL take the current one
        self.dtype: torch.dtype = getattr(torch, weights_dtype(config.dtype, model_config.dtype))
        placement = initial_placement(config, model_config, num_ranks)
        num_slots = slots_per_rank(config, model_config, num_ranks)[rank]
        self.counter = ExpertCounter(len(model_config.moe_layers), model_config.moe.num_experts, self.device)
        kernels = native_kernels(self.device, group)
        self._runs_torch = kernels is None
        kit: Kit = (
            TorchKit(self.dtype, self.device, config.batch_invariant)
            if kernels is None
            else NativeKit(kernels, self.dtype)
        )
        self._limits = Limits.of(config)
        buckets = buckets_of(config, num_ranks) if self._limits is None else ()
        capture = capture_on(self.device) if kernels is None and buckets else None
        dispatchers = choose_dispatchers(
            config,
            model_config,
            group,
            num_slots=placement.max_slots,
            row_ops=kit.row_ops,
            dtype=self.dtype,
            can_share_memory=kernels is not None and local_ranks == num_ranks,
            has_buckets=capture is not None,
        )
        self.source: WeightSource = (
            RandomWeights(config.seed) if config.load_format == "dummy" else open_weights(path, model_config)
        )
        bar = tqdm(
            total=model_config.num_layers, desc="loading layers", disable=None if rank == 0 else True, leave=False
        )
        with bar, giving_memory_back() if self.device.type == "cpu" else nullcontext():
            loader = ModelLoader(
                model_config, self.source, placement, rank, num_slots, dispatchers, self.counter, kit, self._limits
            )
            self.model = loader.load(progress=bar.update)
        self.slot_tasks = SlotTasks(rank, loader, [block.experts for block in self.model.sparse_blocks])
        num_blocks = choose_num_blocks(config, model_config, self.dtype, self.device, local_ranks)
        # What padding writes goes to one page more.
        num_pages = num_blocks + (capture is not None)
        self.cache = KVCache(model_config, num_pages, config.block_size, self.dtype, self.device)
        self._argmax = kit.argmax
        self._run_layers = kit.bind(self.model.layers, self.cache)
        self.sequences: dict[int, Sequence] = {}
        self._keeps_experts = config.record_trace is not None
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            self._graphs = DecodeGraphs(
                partial(self.model.forward, run_layers=self._run_layers),
                buckets,
                num_ranks=num_ranks,
                max_context=config.max_model_len or model_config.max_model_len,
                block_size=config.block_size,
                spare_page=num_blocks,
                hidden_size=model_config.hidden_size,
                dtype=self.dtype,
                device=self.device,
                capture=capture,
            )
        self.info = RankInfo(
            rank=rank,
            pid=os.getpid(),
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            num_threads=torch.get_num_threads() if kernels is None else kernels.num_threads,
            num_blocks=num_blocks,
            kv_cache_bytes=self.cache.nbytes,
            weight_bytes=self.model.nbytes,
            load_seconds=time.perf_counter() - start,
            kernels=kit.describe(),
            batch_invariant=kernels is not None or config.batch_invariant,
            dispatchers=tuple(dispatchers),
            buckets=() if self._graphs is None else buckets,
            graph_bytes=0 if self._graphs is None else self._graphs.nbytes,
        )

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> RankResult:
        """Run this rank's share of a plan. Every rank runs every plan, also without tokens of its own."""
        start = time.perf_counter()
        work = plan.ranks[self.rank]
        self._admit(work)
        expert_work: list[ExpertWork] | None = [] if plan.measure else None
        with self._torch_threads():
            params = [self.sequences[chunk.seq_id].params for chunk in work.chunks]
            routing = step_routing(work, params, self._model_config, self.device, keep_all=self._keeps_experts)
            limits = self._step_limits(work, plan)
            hidden_TD = self.forward(work, plan, expert_work, routing, limits)
            samples = self._sample(work.chunks, hidden_TD)
            prompt_logprobs = self._prompt_logprobs(work.chunks, hidden_TD)
        seconds = time.perf_counter() - start
        routed = routed_experts(work, params, routing, keep_all=self._keeps_experts)
        result = RankResult(plan.step, self.rank, samples, prompt_logprobs, seconds, expert_work or [], routed)
        return result if limits is None else with_limits(result, work, limits)

    def forward(
        self,
        work: RankPlan,
        plan: StepPlan,
        expert_work: list[ExpertWork] | None = None,
        routing: StepRouting | None = None,
        limits: StepLimits | None = None,
    ) -> Tensor:
        """Hidden states of the tokens of this rank's share, in its order."""
        rows = self._rows(work)
        if plan.bucket:
            assert self._graphs is not None and routing is None and work.num_decode == len(work.chunks)
            return self._graphs(rows, plan.bucket, expert_work)
        return self.run_batch(self._batch(work, plan, rows, expert_work, routing, limits))

    def run_batch(self, batch: Batch) -> Tensor:
        """Hidden states `[T, D]` of a batch."""
        return self.model.forward(batch, self._run_layers)

    @torch.inference_mode()
    def run_task(self, task: SlotTask) -> SlotReport:
        """Get on with a task, between steps; see `SlotTask`. What goes wrong is reported, and serving goes on."""
        with self._torch_threads():
            return self.slot_tasks.run(task)

    @contextmanager
    def _torch_threads(self) -> Iterator[None]:
        """One torch thread beside native kernels: torch's own spin after an op, on cores that the kernels want."""
        threads = torch.get_num_threads()
        if not self._runs_torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def expert_counts(self) -> np.ndarray:
        """Tokens of this rank per (phase, sparse layer, logical expert): int64 [2, L, E], prefill then decode."""
        counts: np.ndarray = self.counter.counts_2LE.cpu().numpy()
        return counts

    def _admit(self, work: RankPlan) -> None:
        for seq_id in work.dropped:
            del self.sequences[seq_id]
        for new in work.new_sequences:
            self.sequences[new.seq_id] = Sequence(
                list(new.token_ids), new.num_prompt_tokens, new.params, new.seed, blocks=[]
            )
        for route in work.routes:
            self.model.sparse_blocks[route.layer].route(route.expert, route.slots)

    def _step_limits(self, work: RankPlan, plan: StepPlan) -> StepLimits | None:
        if self._limits is None:
            return None
        return step_limits(plan.rank_rows, work.num_tokens, len(self._model_config.moe_layers), self.device)

    def _rows(self, work: RankPlan) -> StepRows:
        """The rows of this rank's share; its sequences take their new pages."""
        rows = StepRows()
        size = self.config.block_size
        for chunk in work.chunks:
            sequence = self.sequences[chunk.seq_id]
            sequence.blocks.extend(chunk.new_blocks)
            where = range(chunk.start, chunk.start + chunk.num_tokens)
            rows.tokens += sequence.token_ids[chunk.start : where.stop]
            rows.positions += where
            rows.num_prompt += [sequence.num_prompt_tokens] * chunk.num_tokens
            rows.slots += [sequence.blocks[position // size] * size + position % size for position in where]
            rows.blocks.append(sequence.blocks)
        assert len(rows.tokens) == len(rows.positions), "a plan names positions whose tokens this rank does not have"
        return rows

    def _batch(
        self,
        work: RankPlan,
        plan: StepPlan,
        rows: StepRows,
        expert_work: list[ExpertWork] | None,
        routing: StepRouting | None,
        limits: StepLimits | None,
    ) -> Batch:
        columns = self._tensor([*rows.tokens, *rows.positions, *rows.num_prompt, *rows.slots]).view(4, len(rows.tokens))
        attention = AttentionMetadata.build(
            [chunk.num_tokens for chunk in work.chunks],
            [chunk.start + chunk.num_tokens for chunk in work.chunks],
            rows.blocks,
            self.device,
        )
        return Batch(
            token_T=columns[0],
            position_T=columns[1],
            num_prompt_T=columns[2],
            slot_T=columns[3],
            attention=attention,
            num_decode=work.num_decode,
            dispatcher=plan.dispatcher,
            tokens_per_rank=plan.tokens_per_rank,
            expert_work=expert_work,
            routing=routing,
            limits=limits,
        )

    def _sample(self, chunks: list[Chunk], hidden_TD: Tensor) -> list[Sample]:
        """Sample behind every chunk that asks for it, and append each token to its sequence."""
        last: list[int] = []  # rows behind which to sample
        end = 0
        for chunk in chunks:
            end += chunk.num_tokens
            if chunk.sample:
                last.append(end - 1)
        if not last:
            return []
        seq_ids = [chunk.seq_id for chunk in chunks if chunk.sample]
        sequences = [self.sequences[seq_id] for seq_id in seq_ids]
        # In a step of decode rows that is every row.
        logits_BV = self.model.logits(hidden_TD if len(last) == end else hidden_TD[self._tensor(last)])
        rows = [SamplingRow(s.params, s.seed, s.token_ids, s.num_prompt_tokens) for s in sequences]
        tokens = sample(logits_BV, rows, self._argmax)
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        for num_best in {row.params.logprobs for row in rows} - {None}:
            which = [index for index, row in enumerate(rows) if row.params.logprobs == num_best]
            found = token_logprobs(logits_BV[which], [tokens[index] for index in which], num_best or 0)
            for index, entry in zip(which, found, strict=True):
                logprobs[index] = entry
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.token_ids.append(token)
        return [Sample(*sampled) for sampled in zip(seq_ids, tokens, logprobs, strict=True)]

    def _prompt_logprobs(self, chunks: list[Chunk], hidden_TD: Tensor) -> list[PromptLogprobs]:
        found, row = [], 0
        for chunk in chunks:
            sequence = self.sequences[chunk.seq_id]
            num_best = sequence.params.prompt_logprobs
            known = sequence.token_ids[chunk.start + 1 : sequence.num_prompt_tokens][: chunk.num_tokens]
            if num_best is not None and known:
                entries: list[TokenLogprobs] = []
                for first in range(0, len(known), PROMPT_LOGPROB_ROWS):
                    part = known[first : first + PROMPT_LOGPROB_ROWS]
                    logits = self.model.logits(hidden_TD[row + first : row + first + len(part)])
                    entries += token_logprobs(logits, part, num_best)
                found.append(PromptLogprobs(chunk.seq_id, chunk.start, entries))
            row += chunk.num_tokens
        return found

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


if __name__ == "__main__":
    from moe_runtime.rank_main import main

    main()
