"""One rank: its share of the model, its pages, its sequences. Runs the steps that it is given.

It runs in its own process (see `cluster.rank`) or in the caller's process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.grammars.matcher import Matcher
from moe_runtime.grammars.tokens import token_trie
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.layers.batch import Batch, BatchPages, StepLimits, StepPolicies
from moe_runtime.layers.capacity import step_limits, with_limits
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.kit import HiddenRows, Kit
from moe_runtime.layers.kv_cache import KVCache, choose_num_pages
from moe_runtime.layers.moe import ExpertCounter
from moe_runtime.memory.graph_buckets import buckets_of
from moe_runtime.memory.initial_placement import initial_placement, slots_per_rank
from moe_runtime.memory.model_size import cache_dtype, weights_dtype
from moe_runtime.models.reader import ModelReader
from moe_runtime.models.registry import names_of
from moe_runtime.system.pages import giving_memory_back
from moe_runtime.wire.executor import RankInfo
from moe_runtime.wire.messages import (
    ExpertWork,
    NewSequence,
    RankPlan,
    RankResult,
    RankStep,
    SlotReport,
    SlotTask,
)
from moe_runtime.worker.decode_graphs import DecodeGraphs, Run, capture_on
from moe_runtime.worker.rank_setup import choose_device, choose_dispatchers, make_kit, native_kernels, open_source
from moe_runtime.worker.rank_step import PreparedStep, RunningStep, Sequence, StepRows
from moe_runtime.worker.slot_tasks import SlotTasks
from moe_runtime.worker.step_policies import routed_experts, step_policies
from moe_runtime.worker.step_samples import find_prompt_logprobs, look_ahead, sample_step

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class Worker:
    """Reads one rank's weights, reserves its pages and runs step plans.

    Args:
        config, model_config: the user's options, and the checkpoint's configuration.
        path: directory of the checkpoint.
        rank, num_ranks: this rank, and the number of ranks.
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
            torch.cuda.set_device(self.device)  # Triton and NCCL use the current device
        self.dtype: torch.dtype = getattr(torch, weights_dtype(config.dtype, model_config.dtype))
        placement = initial_placement(config, model_config, num_ranks)
        self.counter = ExpertCounter(len(model_config.moe_layers), model_config.moe.num_experts, self.device)
        kernels = native_kernels(self.device, group)
        self._runs_torch = kernels is None
        kit = make_kit(config, kernels, self.dtype, self.device)
        self._limits = config.limits
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
        self.source = open_source(config, model_config, path)
        reader = ModelReader(
            model_config,
            names_of(model_config.family),
            self.source,
            placement,
            rank,
            slots_per_rank(config, model_config, num_ranks)[rank],
            dispatchers,
            self.counter,
            kit,
            self._limits,
        )
        self.model = self._read_model(reader)
        self.slot_tasks = SlotTasks(rank, reader, [block.experts for block in self.model.sparse_blocks])
        self._kv_dtype = cache_dtype(config.kv_cache_dtype, str(self.dtype).removeprefix("torch."))
        num_pages = choose_num_pages(config, model_config, self._kv_dtype, self.device, local_ranks)
        # Padding writes to one additional page of each page group.
        held = [count + (capture is not None) for count in num_pages]
        self.cache = KVCache(model_config, held, config.block_size, self._kv_dtype, self.device)
        self._argmax = kit.argmax
        self._layers = kit.bind(self.model.layers, self.cache)
        self.sequences: dict[int, Sequence] = {}
        self._trie: LLTokenizer | None = None  # from the first grammar on
        self._running: RunningStep | None = None
        self._keeps_experts = config.record_trace is not None
        self._graphs = None if capture is None else self._capture(capture, buckets, num_ranks, num_pages)
        self.info = self._describe(kit, tuple(dispatchers), num_pages, buckets, time.perf_counter() - start)

    def _describe(
        self,
        kit: Kit,
        dispatchers: tuple[str, ...],
        num_pages: tuple[int, ...],
        buckets: tuple[int, ...],
        seconds: float,
    ) -> RankInfo:
        return RankInfo(
            rank=self.rank,
            pid=os.getpid(),
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            num_threads=kit.num_threads,
            num_pages=num_pages,
            kv_cache_bytes=self.cache.nbytes,
            kv_cache_dtype=self._kv_dtype,
            weight_bytes=self.model.nbytes,
            load_seconds=seconds,
            kernels=kit.describe(),
            batch_invariant=kit.batch_invariant,
            dispatchers=dispatchers,
            buckets=() if self._graphs is None else buckets,
            graph_bytes=0 if self._graphs is None else self._graphs.nbytes,
        )

    def _read_model(self, reader: ModelReader) -> Decoder:
        total, disable = self._model_config.num_layers, None if self.rank == 0 else True
        bar = tqdm(total=total, desc="loading layers", disable=disable, leave=False)
        with bar, giving_memory_back() if self.device.type == "cpu" else nullcontext():
            return reader.read(progress=bar.update)

    def _capture(
        self, capture: Callable[[Run], Run], buckets: tuple[int, ...], num_ranks: int, spare_pages: tuple[int, ...]
    ) -> DecodeGraphs:
        return DecodeGraphs(
            self.run_batch,
            buckets,
            num_ranks=num_ranks,
            max_context=self.config.max_model_len or self._model_config.max_model_len,
            block_size=self.config.block_size,
            spare_pages=spare_pages,
            hidden_size=self._model_config.hidden_size,
            dtype=self.dtype,
            device=self.device,
            capture=capture,
        )

    def step(self, step: RankStep) -> RankResult:
        """Run a step. Every rank runs every step, even without tokens of its own."""
        self.begin(self.prepare(step))
        return self.finish()

    @torch.inference_mode()
    def prepare(self, plan: RankStep) -> PreparedStep:
        """Do the work for a step that needs no tokens of the previous step, which may still run. Call in plan order."""
        start = time.perf_counter()
        work = plan.work
        self._admit(work)
        sequences = [self.sequences[chunk.seq_id] for chunk in work.chunks]
        rows = StepRows.take(work.chunks, sequences, len(self._model_config.windows), self.config.block_size)
        params = [sequence.params for sequence in sequences]
        expert_work: list[ExpertWork] | None = [] if plan.measure else None
        batch: Batch | None = None
        attention: list[Any] = []
        with self._torch_threads():
            policies = step_policies(work, params, self._model_config, self.device, keep_all=self._keeps_experts)
            limits = self._step_limits(work, plan)
            if not plan.bucket:
                batch = self._batch(work, plan, rows, expert_work, policies, limits)
                attention = self.model.attention_steps(batch, self.model.rope)
        seconds = time.perf_counter() - start
        return PreparedStep(plan, sequences, rows, batch, attention, expert_work, policies, limits, seconds)

    @torch.inference_mode()
    def begin(self, step: PreparedStep) -> None:
        """Start a step. Its layers then run on a GPU, or in threads of the native kernels, until `finish`."""
        assert self._running is None
        start = time.perf_counter()
        for choice in step.work.replica_choices:
            self.model.sparse_blocks[choice.layer].use_replicas(choice.expert, choice.slots)
        with self._torch_threads():
            self.cache.copy_pages(step.work.page_copies)
            self._running = RunningStep(step, start, self.launch(step))

    @torch.inference_mode()
    def finish(self) -> RankResult:
        """Wait for the layers of the step that has begun, and sample."""
        assert self._running is not None
        running, self._running = self._running, None
        step = running.step
        look_ahead(step)  # while the layers run
        with self._torch_threads():
            hidden_TD = running.hidden()
            samples = sample_step(step, hidden_TD, self.model, self._argmax, self._model_config.eos_token_ids)
            prompt_logprobs = find_prompt_logprobs(step, hidden_TD, self.model)
        seconds = step.seconds + time.perf_counter() - running.start
        routed = routed_experts(step, keep_all=self._keeps_experts)
        work = step.expert_work or []
        result = RankResult(step.plan.step, self.rank, samples, prompt_logprobs, seconds, work, routed)
        return result if step.limits is None else with_limits(result, step.work, step.limits)

    def launch(self, step: PreparedStep) -> HiddenRows:
        """Start the layers; the rows are hidden states of the tokens of this rank's share, in its order."""
        tokens, bucket = step.tokens(), step.plan.bucket
        if step.batch is not None:
            return self.model.begin(self._tensor(tokens), step.batch, step.attention, self._layers)
        assert self._graphs is not None and step.policies is None
        hidden_TD = self._graphs(tokens, step.rows, bucket, step.expert_work)
        return lambda: hidden_TD

    def run_batch(self, token_T: Tensor, batch: Batch) -> Tensor:
        """Hidden states `[T, D]` of a batch."""
        attention = self.model.attention_steps(batch, self.model.rope)
        return self.model.begin(token_T, batch, attention, self._layers)()

    @torch.inference_mode()
    def run_task(self, task: SlotTask) -> SlotReport:
        """Continue a task between steps; see `SlotTask`. Errors are reported, and serving continues."""
        with self._torch_threads():
            return self.slot_tasks.run(task)

    @contextmanager
    def _torch_threads(self) -> Iterator[None]:
        """One torch thread if there are native kernels: torch's threads spin after an op on cores the kernels need."""
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

    def forget(self) -> None:
        """Drop all sequences and counts, as if no step had run."""
        self.sequences.clear()
        self.counter.counts_2LE.zero_()

    def _admit(self, work: RankPlan) -> None:
        for seq_id in work.dropped:
            del self.sequences[seq_id]
        if work.vocabulary is not None:
            self._trie = token_trie(work.vocabulary)
        for new in work.new_sequences:
            self.sequences[new.seq_id] = Sequence(
                list(new.token_ids),
                new.num_prompt_tokens,
                new.params,
                new.seed,
                pages=[list(pages) for pages in new.pages] or [[] for _ in self._model_config.windows],
                matcher=self._matcher(new) if new.grammar else None,
            )

    def _matcher(self, new: NewSequence) -> Matcher:
        assert self._trie is not None, "the vocabulary comes with the first grammar"
        return Matcher(self._trie, new.grammar, new.token_ids[new.num_prompt_tokens :])

    def _step_limits(self, work: RankPlan, plan: RankStep) -> StepLimits | None:
        if self._limits is None:
            return None
        return step_limits(plan.rank_rows, work.num_tokens, len(self._model_config.moe_layers), self.device)

    def _batch(
        self,
        work: RankPlan,
        plan: RankStep,
        rows: StepRows,
        expert_work: list[ExpertWork] | None,
        policies: StepPolicies | None,
        limits: StepLimits | None,
    ) -> Batch:
        columns = self._tensor([rows.positions, rows.num_prompt, *rows.cache_positions])
        num_query = [chunk.num_tokens for chunk in work.chunks]
        context_len = [chunk.start + chunk.num_tokens for chunk in work.chunks]
        return Batch(
            position_T=columns[0],
            num_prompt_T=columns[1],
            pages=[
                BatchPages(cache_position_T, AttentionMetadata.build(num_query, context_len, pages, self.device))
                for cache_position_T, pages in zip(columns[2:], rows.pages, strict=True)
            ],
            num_decode=work.num_decode,
            dispatcher=plan.dispatcher,
            tokens_per_rank=plan.tokens_per_rank,
            expert_work=expert_work,
            policies=policies,
            limits=limits,
        )

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
