"""Predicts a step's time and a rank's memory for a model's shape, hardware, placement and routing.

docs/planner.md has the formulas. Shape suffixes: L layers, E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.choice import whole_shares
from moe_runtime.balancer.placement import Placement
from moe_runtime.balancer.split import split_tokens
from moe_runtime.planner.exchange import exchange_seconds
from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.routing import Routing
from moe_runtime.planner.shape import Matrix, ModelShape
from moe_runtime.planner.sharing import counts_up_to, ending_times

Floats = npt.NDArray[np.float64]
Phase = Literal["prefill", "decode"]

NUM_STEPS = 4  # number of random steps that are averaged
NORM_PASSES = 8  # over a token's row in a layer: two norms read a block's rows and the residual rows, and write both


@dataclass(frozen=True)
class Workload:
    """What a step does.

    Attributes:
        phase: one token of each sequence ("decode"), or whole prompts ("prefill").
        sequences: number on all ranks together, spread evenly.
        length: keys of each sequence, or tokens of each prompt.

    Raises:
        ValueError: a value is not allowed.
    """

    phase: Phase
    sequences: int
    length: int

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise ValueError(f"phase: {self.phase!r} is not allowed; it must be prefill or decode")
        for name in ("sequences", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; it must be at least 1")

    @property
    def tokens_per_sequence(self) -> int:
        return self.length if self.phase == "prefill" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank: dense weights, expert slots, pages of its sequences, and what else it needs."""

    dense: float
    experts: float
    kv_cache: float
    reserved: float

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.kv_cache + self.reserved


@dataclass(frozen=True)
class Prediction:
    """The predicted figures of a choice.

    Attributes:
        parts: seconds of a step by part: attention, kv, dense, experts, exchange, head, overhead. They add up to the
            step. If two half batches take turns, `exchange` is only the time that computing does not hide.
        busy_seconds: of all ranks together, without waiting for each other; on nodes with cores, it includes sending.
        tokens: tokens of a step.
        balancedness: mean over layers and steps of mean rank rows / max rank rows.
        rank_memory: of the rank with the most sequences.
        fits: whether the memory is sufficient.
    """

    parts: dict[str, float]
    busy_seconds: float
    tokens: int
    balancedness: float
    rank_memory: Memory
    fits: bool

    @property
    def step_seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


@dataclass(frozen=True)
class _Rates:
    """Rates of each rank while `active` ranks of a node work at once."""

    hardware: Hardware
    num_ranks: int
    active: int

    @property
    def bandwidth(self) -> float:
        return self.hardware.bandwidth(self.num_ranks, self.active)

    @property
    def own_cores(self) -> float:
        """Cores of a rank while it works."""
        return max(self.hardware.cores_per_rank(self.num_ranks), 1.0)

    def products(self, matrices: Sequence[Matrix], rows: Floats, share: float = 1.0) -> Floats:
        """Seconds of products with `rows` rows; a product takes the longer of reading its weights and computing.

        Reading gets `share` of the bandwidth.
        """
        total = np.zeros_like(rows)
        for matrix in matrices:
            outputs = -(-matrix.outputs // self.hardware.output_multiple) * self.hardware.output_multiple
            scale = outputs / matrix.outputs
            rate = self.hardware.rate(matrix.dtype, self.num_ranks, self.active)
            read = scale * self.hardware.stored_bytes((matrix,)) / (self.bandwidth * share)
            compute = 2.0 * scale * matrix.parameters * rows / (rate * self.hardware.efficiency_of(matrix.dtype, rows))
            total += np.where(rows > 0, np.maximum(read, compute), 0.0)
        return total

    def attention(self, shape: ModelShape, work: Workload, sequences_W: Floats) -> Floats:
        """Seconds of all layers' attention without its projections: reading or multiplying keys and values."""
        hardware, is_decode = self.hardware, work.phase == "decode"
        flops = shape.decode_flops_per_key if is_decode else shape.prefill_flops_per_key
        rate = hardware.rate(hardware.attention_dtype, self.num_ranks, self.active) * hardware.attention_rate
        bandwidth, total = self.bandwidth * hardware.attention_bandwidth, 0.0
        for window, num_layers in Counter(shape.windows).items():
            keys = min(work.length, window or work.length)
            pairs = float(keys) if is_decode else keys * (keys + 1) / 2 + (work.length - keys) * float(keys)
            total += num_layers * max(keys * shape.kv_bytes / bandwidth, pairs * flops / rate)
        found: Floats = sequences_W * total
        return found


def predict(
    shape: ModelShape, hardware: Hardware, placement: Placement, routing: Routing, work: Workload
) -> Prediction:
    """Predict a step with this placement.

    Args:
        placement: of the layers that `routing` has; they represent all of `shape`'s sparse layers.

    Raises:
        ValueError: a placement of other experts or layers, or a dtype that the hardware has no rates for.
    """
    _check_placement(placement, len(routing.plan_load), shape.num_experts)
    num_ranks = placement.num_ranks
    halves = hardware.overlap if work.sequences >= 2 * num_ranks and num_ranks > 1 else 1
    per_rank, rest = divmod(work.sequences, num_ranks)
    sequences_W = per_rank + (np.arange(num_ranks) < rest).astype(np.float64)
    half_W = sequences_W / halves
    tokens_W = half_W * work.tokens_per_sequence
    rates = _Rates(hardware, num_ranks, min(int((sequences_W > 0).sum()), hardware.ranks_per_node))
    num_dense = shape.num_layers - shape.num_sparse_layers
    beside_experts_W = rates.products((*shape.shared, shape.gate), tokens_W)
    layers_W = {
        "attention": shape.num_layers * rates.products(shape.attention, tokens_W),
        "kv": rates.attention(shape, work, half_W),
        "dense": num_dense * rates.products(shape.dense_mlp, tokens_W) + shape.num_sparse_layers * beside_experts_W,
    }
    sparse = _sparse_layers(shape, hardware, placement, routing, tokens_W)
    over = hardware.overheads
    on_node = min(num_ranks, hardware.ranks_per_node)
    nbytes = _bytes_read(shape, hardware, work, sequences_W, sparse.bytes_read)
    cold = hardware.cold(nbytes * on_node / num_ranks)
    step = (over.step if num_ranks == 1 else over.step_ranks) * cold
    head_W = rates.products((shape.head,), sequences_W)
    own_W = halves * _layer_overheads(shape, rates, tokens_W) + over.step_row * sequences_W

    turns, alone = hardware.turns(on_node), hardware.turns(rates.active)
    parts = {name: alone * halves * float(seconds_W.max()) for name, seconds_W in layers_W.items()}
    parts["experts"] = turns * halves * sparse.slowest
    hidden = sum(parts.values()) if halves > 1 else 0.0
    parts["exchange"] = max(turns * halves * sparse.exchange - hidden, 0.0)
    parts["head"] = alone * float(head_W.max())
    parts["overhead"] = step + turns * float(own_W.max())
    busy_W = halves * (sum(layers_W.values()) + sparse.experts_W) + head_W + own_W
    if hardware.cores is not None:  # the rank's own cores do the sending
        busy_W = busy_W + halves * sparse.exchange
    if turns > 1:
        busy_W = busy_W + (sequences_W == 0) * 2 * shape.num_sparse_layers * over.wait
    memory = _memory(shape, hardware, placement, work, float(sequences_W.max()))
    return Prediction(
        parts=parts,
        busy_seconds=float(busy_W.sum()) + num_ranks * over.step * cold,
        tokens=work.sequences * work.tokens_per_sequence,
        balancedness=sparse.balancedness,
        rank_memory=memory,
        fits=memory.total * (1 if hardware.cores is None else on_node) <= hardware.memory_bytes,
    )


def _check_placement(placement: Placement, num_layers: int, num_experts: int) -> None:
    if (placement.num_layers, placement.num_experts) != (num_layers, num_experts):
        raise ValueError(
            f"placement: {placement.num_layers} layers of {placement.num_experts} experts are not allowed; "
            f"it must have {num_layers} layers of {num_experts} experts"
        )


def _layer_overheads(shape: ModelShape, rates: _Rates, tokens_W: Floats) -> Floats:
    """Seconds of all layers on each rank that are neither products nor attention."""
    over = rates.hardware.overheads
    passes = NORM_PASSES * shape.num_layers + shape.top_k * shape.num_sparse_layers  # the sum reads a row per k
    bytes_W = tokens_W * passes * shape.bytes_back / rates.own_cores
    found: Floats = shape.num_layers * (over.layer + over.layer_row * tokens_W) + over.layer_byte * bytes_W
    return found


@dataclass(frozen=True)
class _Sparse:
    """Seconds of all sparse layers: each rank's experts, the slowest rank's experts summed over layers, sending.

    `bytes_read`: weight bytes of one layer's experts that have rows, on all ranks.
    """

    experts_W: Floats
    slowest: float
    exchange: float
    balancedness: float
    bytes_read: float


def _sparse_layers(
    shape: ModelShape, hardware: Hardware, placement: Placement, routing: Routing, tokens_W: Floats
) -> _Sparse:
    num_ranks, num_tokens = placement.num_ranks, max(round(float(tokens_W.sum())), 1)
    experts_W = np.zeros(num_ranks)
    slowest = exchange = balancedness = used = 0.0
    for layer in range(placement.num_layers):
        for draw in range(NUM_STEPS):
            count_E = routing.counts(layer, num_tokens, draw)
            share_EW = split_tokens(count_E, placement.slots[layer])
            rows_EW = whole_shares(share_EW, count_E).astype(np.float64)
            rows_W = rows_EW.sum(axis=0)
            seconds_W = _experts_seconds(shape, hardware, rows_EW)
            experts_W += seconds_W
            slowest += float(seconds_W.max())
            used += float((rows_EW > 0).sum())
            balancedness += float(rows_W.mean() / rows_W.max()) if rows_W.any() else 1.0
            if num_ranks > 1 and draw == 0:  # one draw is enough: it varies little
                exchange += NUM_STEPS * exchange_seconds(shape, hardware, routing, layer, share_EW, rows_W, tokens_W)
    samples = placement.num_layers * NUM_STEPS
    scale = shape.num_sparse_layers / samples
    return _Sparse(
        experts_W=experts_W * scale,
        slowest=slowest * scale,
        exchange=exchange * scale,
        balancedness=min(balancedness / samples, 1.0),
        bytes_read=used / samples * hardware.stored_bytes(shape.expert),
    )


def _experts_seconds(shape: ModelShape, hardware: Hardware, rows_EW: Floats) -> Floats:
    """Seconds until each rank's experts have computed their rows, if all ranks start together: `[W]`."""
    over, num_ranks = hardware.overheads, rows_EW.shape[1]
    on_node = min(num_ranks, hardware.ranks_per_node)

    def seconds_at(active: int) -> Floats:
        rates = _Rates(hardware, num_ranks, active)
        row_seconds = over.expert_byte * shape.bytes_back / rates.own_cores
        products_EW = rates.products(shape.expert, rows_EW, hardware.expert_bandwidth)
        found: Floats = (products_EW + over.slot * (rows_EW > 0) + row_seconds * rows_EW).sum(axis=0)
        return found

    if hardware.cores is None or hardware.turns(on_node) > 1:
        return seconds_at(on_node)
    counts = counts_up_to(on_node)
    seconds_CW = np.stack([seconds_at(active) for active in counts])
    nodes = (slice(first, first + on_node) for first in range(0, num_ranks, on_node))
    return np.concatenate([ending_times(counts, seconds_CW[:, node]) for node in nodes])


def _bytes_read(
    shape: ModelShape, hardware: Hardware, work: Workload, sequences_W: Floats, expert_bytes: float
) -> float:
    """Bytes that all ranks together read in a step; `expert_bytes`: read of the experts of one sparse layer."""
    at_work = float((sequences_W > 0).sum())
    pages = work.sequences * shape.keys_seen(work.length) * shape.kv_bytes
    return at_work * hardware.stored_bytes(shape.dense) + shape.num_sparse_layers * expert_bytes + pages


def _memory(shape: ModelShape, hardware: Hardware, placement: Placement, work: Workload, sequences: float) -> Memory:
    slots = placement.max_slots + (placement.num_ranks > 1)  # plus the shadow slot
    return Memory(
        dense=hardware.stored_bytes(shape.dense) + shape.embedding_bytes,
        experts=shape.num_sparse_layers * slots * hardware.stored_bytes(shape.expert),
        kv_cache=sequences * shape.keys_seen(work.length) * shape.kv_bytes,
        reserved=hardware.reserved_bytes,
    )
