"""Memory of the ranks, before anything is loaded: weights, KV cache, buffers, and the remainder. No torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.kernels.cpu.library import EXPERT_ROWS, can_have_kernels
from moe_runtime.memory.model_size import (
    ITEMSIZE,
    cache_bytes,
    cache_dtype,
    dense_bytes,
    page_bytes,
    slot_bytes,
    weights_dtype,
)
from moe_runtime.memory.page_group import page_groups

CPU_DEFAULT_BYTES = 4 << 30
FREE_MEMORY_SHARE = 0.5
PROCESS_BYTES = 190 << 20  # per rank: interpreter and libraries
SHARED_BYTES = 150 << 20  # the part of these that the ranks of a host share
DECODE_CHUNK = 256  # keys per chunk of decode attention on GPUs
SAMPLER_BYTES = 40  # per row and token of the vocabulary: logits, and their sorted, float64 and cumulative copies
CUDA_DRIVER = Path("/dev/nvidiactl")
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank takes.

    Attributes:
        dense: weights that every rank holds.
        experts: weights in its `num_slots` slots of each sparse layer.
        kv_cache: `num_pages` pages of each page group.
        buffers: an estimate of the process itself and the rows of its largest step.
    """

    dense: int
    experts: int
    kv_cache: int
    buffers: int
    num_slots: int
    num_pages: tuple[int, ...]

    @property
    def weights(self) -> int:
        return self.dense + self.experts

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.buffers


@dataclass(frozen=True)
class Budget:
    """Memory of the ranks that share a host.

    Attributes:
        ranks: the memory of each; ranks differ only in their slots.
        available: free bytes of the host; None for ranks on GPUs, since only a rank sees its GPU's memory.
    """

    ranks: tuple[RankMemory, ...]
    available: int | None

    @property
    def largest(self) -> RankMemory:
        """The rank that takes most."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def total(self) -> int:
        return sum(rank.total for rank in self.ranks)

    @property
    def left(self) -> int | None:
        """Available bytes that remain; negative if the ranks do not fit."""
        return None if self.available is None else self.available - self.total

    @property
    def fits(self) -> bool | None:
        """Whether the ranks fit; None if that is unknown here."""
        return None if self.left is None else self.left >= 0

    def __str__(self) -> str:
        rank = self.largest
        each = "each" if len(set(self.ranks)) == 1 else "the largest"
        ranks = "1 rank" if len(self.ranks) == 1 else f"{len(self.ranks)} ranks, {each}"
        figures = (
            f"{ranks} with weights {gigabytes(rank.weights)}, KV cache {gigabytes(rank.kv_cache)} "
            f"({pages_text(rank.num_pages)}), buffers {gigabytes(rank.buffers)}"
        )
        if self.available is None or self.left is None:
            return f"{figures}: {gigabytes(self.total)} of GPU memory"
        if self.left < 0:
            return f"{figures}: {gigabytes(self.total)}, but only {gigabytes(self.available)} are free"
        return f"{figures}: {gigabytes(self.total)} of {gigabytes(self.available)} free, {gigabytes(self.left)} left"


def check_budget(engine: EngineConfig, model: ModelConfig, local_ranks: int) -> Budget:
    """The budget of this host; refused if it exceeds the free memory.

    Args:
        engine, model: the user's options, and the checkpoint's configuration.
        local_ranks: how many of the `ep_size` ranks run on this host, the host of the first rank.

    Raises:
        ValueError: the ranks need more than is free. Ranks on GPUs are not refused here: each sees its own memory.
    """
    budget = plan_budget(engine, model, local_ranks, None if may_use_cuda(engine.device) else available_host_memory())
    if budget.fits is False:
        raise ValueError(
            f"model: {engine.model!r} does not fit here: {budget}. "
            "Reduce max_model_len, max_num_seqs or kv_cache_memory_bytes, or use more hosts"
        )
    return budget


def plan_budget(engine: EngineConfig, model: ModelConfig, local_ranks: int, available: int | None) -> Budget:
    """Memory that the first `local_ranks` ranks will take, with `available` free bytes; None for ranks on GPUs.

    The KV cache is the size that a rank chooses once its weights are loaded (`num_cache_pages`). On GPUs it is an upper
    bound. If memory is short, it still holds one sequence of `max_model_len`: without that, a rank does not start.

    Raises:
        ValueError: `kv_cache_memory_bytes` does not hold such a sequence, or the checkpoint's dtype is not supported.
    """
    from moe_runtime.memory.initial_placement import slots_per_rank  # brings numpy

    dtype = weights_dtype(engine.dtype, model.dtype)
    num_slots = slots_per_rank(engine, model, engine.ep_size)[:local_ranks]
    native = has_native_weights(engine.device)
    dense = dense_bytes(model, dtype, native)
    slot = slot_bytes(model, dtype, native)
    kv_dtype = cache_dtype(engine.kv_cache_dtype, dtype)
    sizes = page_bytes(model, engine.block_size, kv_dtype)
    longest, groups = engine.max_model_len or model.max_model_len, page_groups(engine, model)
    if engine.kv_cache_memory_bytes is not None:
        memory = engine.kv_cache_memory_bytes
    elif available is None:
        memory = cache_bytes([group.most_of_step(engine.max_num_seqs, longest) for group in groups], sizes)
    else:
        free = max(available - local_ranks * dense - sum(num_slots) * slot, 0)
        memory = max(default_kv_bytes(free, local_ranks), cache_bytes([each.most(longest) for each in groups], sizes))
    num_pages = num_cache_pages(engine, model, kv_dtype, memory)
    buffers = buffer_bytes(engine, model, local_ranks)
    if may_use_cuda(engine.device):
        buffers += graph_bytes(engine, model)
    ranks = tuple(RankMemory(dense, n * slot, cache_bytes(num_pages, sizes), buffers, n, num_pages) for n in num_slots)
    return Budget(ranks, available)


def buffer_bytes(engine: EngineConfig, model: ModelConfig, local_ranks: int) -> int:
    """Estimated bytes besides weights and pages: the process, and its largest step, with `max_num_batched_tokens` rows
    through a layer and `max_num_seqs` rows through the sampler.

    Every token takes hidden states, queries, keys, values and their product, and the projections of a dense MLP. A
    token that is in a sparse layer at the moment takes more. With balanced experts, each of its K choices takes the row
    sent, two projections, their product and the row returned. With several ranks, the "symmetric" dispatcher adds a row
    per rank and a row per choice. If rows beyond a capacity queue, all tokens' rows return before they are summed.
    """
    moe, hidden, tokens = model.moe, model.hidden_size, engine.max_num_batched_tokens
    at_once, queues = tokens, engine.limits is not None and engine.limits.queues
    if not may_use_cuda(engine.device) and not queues:
        at_once = min(tokens, tokens_at_once(moe.num_experts, moe.top_k, engine.ep_size))
    attention = 7 * hidden + max(layer.attention.row_size for layer in model.layers)
    inner = max(layer.dense_intermediate_size or 0 for layer in model.layers)
    dense = 3 * max(moe.shared_intermediate_size, inner)
    experts = moe.top_k * (2 * hidden + 3 * moe.intermediate_size)
    exchange = (engine.ep_size + moe.top_k) * hidden if engine.ep_size > 1 else 0
    elements = tokens * (attention + dense) + at_once * (experts + exchange)
    rows = elements * ITEMSIZE[weights_dtype(engine.dtype, model.dtype)]
    process = PROCESS_BYTES - SHARED_BYTES + SHARED_BYTES // local_ranks
    return process + rows + engine.max_num_seqs * model.vocab_size * SAMPLER_BYTES


def tokens_at_once(num_experts: int, top_k: int, num_ranks: int) -> int:
    """Maximum tokens of each rank that pass through a sparse layer at a time on CPUs.

    An expert then has `EXPERT_ROWS` rows on average; more rows would not use its weights better. The memory of the rows
    between dispatch and combine does not grow with the tokens of a step.
    """
    return max(1, EXPERT_ROWS * num_experts // (top_k * num_ranks))


def graph_bytes(engine: EngineConfig, model: ModelConfig) -> int:
    """Estimated bytes of the decode steps that a GPU captures: those of the largest, whose memory the others share.

    All ranks' rows go to every rank and back. Attention takes the longest context in chunks and merges them afterwards.
    """
    from moe_runtime.memory.graph_buckets import buckets_of

    rows = max(buckets_of(engine, engine.ep_size), default=0)
    pairs = rows * engine.ep_size * model.moe.top_k
    exchange = pairs * (3 * model.hidden_size + model.moe.intermediate_size)
    chunks = -(-(engine.max_model_len or model.max_model_len) // DECODE_CHUNK)
    merged = rows * chunks * max(layer.attention.num_heads * (layer.attention.value_size + 2) for layer in model.layers)
    return exchange * ITEMSIZE[weights_dtype(engine.dtype, model.dtype)] + merged * ITEMSIZE["float32"]


def num_cache_pages(engine: EngineConfig, model: ModelConfig, kv_dtype: str, memory: int) -> tuple[int, ...]:
    """Pages of each page group in a rank's KV cache of at most `memory` bytes, and no more than its sequences can use.
    `kv_dtype` is the cache's, see `cache_dtype`.

    A sequence of the maximum length fits. Beyond that, all groups have the same number of pages, until a group with a
    window has all that it can use. So no group runs out before the others while sequences are shorter than the windows.

    Raises:
        ValueError: the pages do not hold one sequence of `max_model_len`.
    """
    groups, sizes = page_groups(engine, model), page_bytes(model, engine.block_size, kv_dtype)
    longest = engine.max_model_len or model.max_model_len
    least = [group.most(longest) for group in groups]
    most = [group.most_of_step(engine.max_num_seqs, longest) for group in groups]
    if cache_bytes(least, sizes) > memory:
        raise ValueError(
            f"kv_cache_memory_bytes: {memory} bytes per rank do not hold a sequence of max_model_len {longest}; "
            f"give at least {cache_bytes(least, sizes)} bytes, or reduce max_model_len"
        )

    def pages(count: int) -> tuple[int, ...]:
        return tuple(min(high, max(low, count)) for low, high in zip(least, most, strict=True))

    counts = range(max(most) + 1)
    return pages(bisect_right(counts, memory, key=lambda count: cache_bytes(pages(count), sizes)) - 1)


def pages_text(num_pages: Sequence[int]) -> str:
    """Pages of each page group as text: 5825 pages, 5825 + 640 pages."""
    return f"{' + '.join(map(str, num_pages))} pages"


def default_kv_bytes(free: int, local_ranks: int) -> int:
    """Default KV cache of a CPU rank: half of the free memory, divided among the host's ranks, at most 4 GiB."""
    return min(int(free * FREE_MEMORY_SHARE) // local_ranks, CPU_DEFAULT_BYTES)


def may_use_cuda(device: str) -> bool:
    """Whether ranks with this `device` option may run on GPUs; with "auto", if there is a driver."""
    return device == "cuda" or (device == "auto" and CUDA_DRIVER.exists())


def has_native_weights(device: str) -> bool:
    """Whether native CPU kernels hold the weights of ranks with this `device` option."""
    return not may_use_cuda(device) and can_have_kernels()


def available_host_memory() -> int:
    """Bytes that this process may still take: the host's free memory, within the limit of its control group.

    File contents cached by the group count as free, since the system reclaims these pages when memory is short.
    """
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        files = int(stat["inactive_file"]) + int(stat["active_file"])
        free = min(free, int(limit.read_text()) - int(used.read_text()) + files)
    return max(free, 0)


def gigabytes(count: float) -> str:
    """A number of bytes as text: 1.34 GB, 22.4 GB."""
    value = count / 1e9
    return f"{value:.1f} GB" if abs(value) >= 10 else f"{value:.2f} GB"
