"""One rank: its share of the model, its pages, its sequences. Runs the steps that it is given.

In a process of its own, see `cluster.rank`, or in the caller's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.layers.batch import Batch, StepLimits, StepPolicies
from moe_runtime.layers.capacity import Limits, step_limits, with_limits
from moe_runtime.layers.decoder import Rows
from moe_runtime.layers.kv_cache import KVCache, choose_num_pages
from moe_runtime.layers.moe import ExpertCounter
from moe_runtime.layers.native_kit import NativeKit
from moe_runtime.layers.torch_kit import TorchKit
from moe_runtime.memory.graph_buckets import buckets_of
from moe_runtime.memory.initial_placement import initial_placement, slots_per_rank
from moe_runtime.memory.model_size import weights_dtype
from moe_runtime.models.reader import Kit, ModelReader
from moe_runtime.models.registry import open_weights
from moe_runtime.system.pages import giving_memory_back
from moe_runtime.weights.checkpoint import RandomWeights, WeightSource
from moe_runtime.wire.executor import RankInfo
from moe_runtime.wire.messages import (
    ExpertWork,
    PromptLogprobs,
    RankPlan,
    RankResult,
    RankStep,
    Sample,
    SlotReport,
    SlotTask,
    TokenLogprobs,
)
from moe_runtime.worker.decode_graphs import DecodeGraphs, capture_on
from moe_runtime.worker.rank_setup import choose_device, choose_dispatchers, native_kernels
from moe_runtime.worker.rank_step import PreparedStep, RunningStep, Sequence, StepRows
from moe_runtime.worker.sampler import SamplingRow, sample, token_logprobs
from moe_runtime.worker.slot_tasks import SlotTasks
from moe_runtime.worker.step_policies import routed_experts, step_policies

PROMPT_LOGPROB_ROWS = 256  # rows of logits at a time, so that long prompts do not take gigabytes


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
            loader = ModelReader(
                model_config, self.source, placement, rank, num_slots, dispatchers, self.counter, kit, self._limits
            )
            self.model = loader.load(progress=bar.update)
        self.slot_tasks = SlotTasks(rank, loader, [block.experts for block in self.model.sparse_blocks])
        num_pages = choose_num_pages(config, model_config, self.dtype, self.device, local_ranks)
        # What padding writes goes to one page more.
        num_pages = num_pages + (capture is not None)
        self.cache = KVCache(model_config, num_pages, config.block_size, self.dtype, self.device)
        self._argmax = kit.argmax
        self._layers = kit.bind(self.model.layers, self.cache)
        self.sequences: dict[int, Sequence] = {}
        self._running: RunningStep | None = None
        self._keeps_experts = config.record_trace is not None
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            self._graphs = DecodeGraphs(
                self.run_batch,
                buckets,
                num_ranks=num_ranks,
                max_context=config.max_model_len or model_config.max_model_len,
                block_size=config.block_size,
                spare_page=num_pages,
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
            num_pages=num_pages,
            kv_cache_bytes=self.cache.nbytes,
            weight_bytes=self.model.nbytes,
            load_seconds=time.perf_counter() - start,
            kernels=kit.describe(),
            batch_invariant=kernels is not None or config.batch_invariant,
            dispatchers=tuple(dispatchers),
            buckets=() if self._graphs is None else buckets,
            graph_bytes=0 if self._graphs is None else self._graphs.nbytes,
        )

    def step(self, step: RankStep) -> RankResult:
        """Run a step. Every rank runs every step, also without tokens of its own."""
        self.begin(self.prepare(step))
        return self.finish()

    @torch.inference_mode()
    def prepare(self, plan: RankStep) -> PreparedStep:
        """Do for a step what needs no tokens of the one before, which may be running. Plans come in their order."""
        start = time.perf_counter()
        work = plan.work
        self._admit(work)
        sequences = [self.sequences[chunk.seq_id] for chunk in work.chunks]
        rows = StepRows.take(work.chunks, sequences, self.config.block_size)
        params = [sequence.params for sequence in sequences]
        expert_work: list[ExpertWork] | None = [] if plan.measure else None
        batch = attention = None
        with self._torch_threads():
            policies = step_policies(work, params, self._model_config, self.device, keep_all=self._keeps_experts)
            limits = self._step_limits(work, plan)
            if not plan.bucket:
                batch = self._batch(work, plan, rows, expert_work, policies, limits)
                attention = self.model.attention_step(batch, self.model.rope)
        seconds = time.perf_counter() - start
        return PreparedStep(plan, sequences, rows, batch, attention, expert_work, policies, limits, seconds)

    @torch.inference_mode()
    def begin(self, step: PreparedStep) -> None:
        """Start a step: its layers then run on a GPU, or in threads of the native kernels, until `finish`."""
        assert self._running is None
        start = time.perf_counter()
        for choice in step.work.replica_choices:
            self.model.sparse_blocks[choice.layer].use_replicas(choice.expert, choice.slots)
        with self._torch_threads():
            self._running = RunningStep(step, start, self.launch(step))

    @torch.inference_mode()
    def finish(self) -> RankResult:
        """Wait for the layers of the step that has begun, and sample."""
        assert self._running is not None
        running, self._running = self._running, None
        step = running.step
        with self._torch_threads():
            hidden_TD = running.hidden()
            samples = self.sample(step, hidden_TD)
            prompt_logprobs = self._prompt_logprobs(step, hidden_TD)
        seconds = step.seconds + time.perf_counter() - running.start
        routed = routed_experts(step, keep_all=self._keeps_experts)
        work = step.expert_work or []
        result = RankResult(step.plan.step, self.rank, samples, prompt_logprobs, seconds, work, routed)
        return result if step.limits is None else with_limits(result, step.work, step.limits)

    def launch(self, step: PreparedStep) -> Rows:
        """Start the layers; the rows are hidden states of the tokens of this rank's share, in its order."""
        tokens, bucket = step.tokens(), step.plan.bucket
        if step.batch is not None:
            return self.model.begin(self._tensor(tokens), step.batch, step.attention, self._layers)
        assert self._graphs is not None and step.policies is None
        hidden_TD = self._graphs(tokens, step.rows, bucket, step.expert_work)
        return lambda: hidden_TD

    def run_batch(self, token_T: Tensor, batch: Batch) -> Tensor:
        """Hidden states `[T, D]` of a batch."""
        attention = self.model.attention_step(batch, self.model.rope)
        return self.model.begin(token_T, batch, attention, self._layers)()

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
                list(new.token_ids), new.num_prompt_tokens, new.params, new.seed, pages=[]
            )

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
        columns = self._tensor([*rows.positions, *rows.num_prompt, *rows.cache_positions]).view(3, work.num_tokens)
        attention = AttentionMetadata.build(
            [chunk.num_tokens for chunk in work.chunks],
            [chunk.start + chunk.num_tokens for chunk in work.chunks],
            rows.pages,
            self.device,
        )
        return Batch(
            position_T=columns[0],
            num_prompt_T=columns[1],
            cache_position_T=columns[2],
            attention=attention,
            num_decode=work.num_decode,
            dispatcher=plan.dispatcher,
            tokens_per_rank=plan.tokens_per_rank,
            expert_work=expert_work,
            policies=policies,
            limits=limits,
        )

    def sample(self, step: PreparedStep, hidden_TD: Tensor) -> list[Sample]:
        """Sample behind every chunk that asks for it, and append each token to its sequence."""
        last: list[int] = []  # rows behind which to sample
        seq_ids: list[int] = []
        sequences: list[Sequence] = []
        end = 0
        for chunk, sequence in zip(step.work.chunks, step.sequences, strict=True):
            end += chunk.num_tokens
            if chunk.sample:
                last.append(end - 1)
                seq_ids.append(chunk.seq_id)
                sequences.append(sequence)
        if not last:
            return []
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

    def _prompt_logprobs(self, step: PreparedStep, hidden_TD: Tensor) -> list[PromptLogprobs]:
        found, row = [], 0
        for chunk, sequence in zip(step.work.chunks, step.sequences, strict=True):
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
