"""What `check_cluster.py` measures: the ranks themselves, links between them, collectives, and one layer of experts.

Every function is called by all ranks in the same order. Shape suffixes: T tokens, D hidden, F expert intermediate, K
experts per token, S experts per rank, W ranks.
"""

from __future__ import annotations

import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher, all_gather, make_dispatchers
from moe_runtime.all2all.padded import make_padded
from moe_runtime.kernels import ops

REPEATS = 9
MATRIX = {"cuda": 8192, "cpu": 512}  # size of the product that measures a rank's speed


@dataclass(frozen=True)
class RankFacts:
    """Facts about one rank. `peers` are the other ranks of its host whose memory its device can access directly."""

    rank: int
    host: str
    device: str
    memory_bytes: int
    versions: dict[str, str]
    peers: list[int]
    matrix_us: float


@dataclass(frozen=True)
class Link:
    """Bytes per second that one rank receives from another while all ranks send in a ring."""

    source: int
    target: int
    bytes_per_s: float


@dataclass(frozen=True)
class CollectiveTime:
    """The slowest rank's median time of a collective; every rank sends `nbytes` in total."""

    name: str
    nbytes: int
    us: float
    bytes_per_s: float


@dataclass(frozen=True)
class LayerTime:
    """The slowest rank's median time of dispatch, experts and combine, and the largest error of any rank.

    `error` is relative to the largest output; None if it was not checked.
    """

    dispatcher: str
    tokens: int
    us: float
    error: float | None


@dataclass(frozen=True)
class LayerShape:
    """One sparse layer."""

    hidden: int
    intermediate: int
    experts_per_rank: int
    top_k: int


class Cluster:
    """This rank's view of the group of ranks.

    Args:
        device: of this rank.
        repeats: number of runs; the median counts.
    """

    def __init__(self, device: torch.device, repeats: int = REPEATS) -> None:
        assert dist.group.WORLD is not None
        self.group: dist.ProcessGroup = dist.group.WORLD
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.repeats = repeats

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order of rank."""
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def us(self, call: Callable[[], object], *, alone: bool = False) -> float:
        """Median microseconds of a call, without the first two; all ranks start each call together, unless `alone`."""
        times = []
        for _ in range(self.repeats + 2):
            self._synchronize()
            if not alone:
                dist.barrier()
            begin = time.perf_counter()
            call()
            self._synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times[2:])

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_ranks(cluster: Cluster) -> list[RankFacts]:
    """Every rank's facts; products run on all ranks at once."""
    device = cluster.device
    on_gpu = device.type == "cuda"
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    if on_gpu:
        versions |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    size = MATRIX[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    host = socket.gethostname()
    places = cluster.gather((host, device.index))
    peers = [
        rank
        for rank, (where, index) in enumerate(places)
        if on_gpu and where == host and rank != cluster.rank and torch.cuda.can_device_access_peer(device.index, index)
    ]
    facts = RankFacts(
        cluster.rank,
        host,
        torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        torch.cuda.get_device_properties(device).total_memory if on_gpu else 0,
        versions,
        peers,
        cluster.us(lambda: a @ b, alone=True),
    )
    return cluster.gather(facts)


def measure_links(cluster: Cluster, nbytes: int) -> list[Link]:
    """All pairs: in turn `d` every rank sends to the rank `d` places ahead, and receives from the rank `d` back."""
    W, rank = cluster.num_ranks, cluster.rank
    out, into = torch.empty(2, nbytes, dtype=torch.uint8, device=cluster.device)
    found = []
    for distance in range(1, W):
        target, source = (rank + distance) % W, (rank - distance) % W

        def exchange(target: int = target, source: int = source) -> None:
            both = [dist.P2POp(dist.isend, out, target), dist.P2POp(dist.irecv, into, source)]
            for work in dist.batch_isend_irecv(both):
                work.wait()

        found.append(Link(source, rank, nbytes / cluster.us(exchange) * 1e6))
    return [link for links in cluster.gather(found) for link in links]


def measure_collectives(cluster: Cluster, sizes: list[int]) -> Iterator[CollectiveTime]:
    """All-to-all and all-gather, as dispatchers use them; sizes are the bytes that a rank sends in total."""
    W = cluster.num_ranks
    for nbytes in sizes:
        part = max(1, nbytes // W)
        source = torch.empty(W * part, dtype=torch.uint8, device=cluster.device)
        target = torch.empty_like(source)
        gathered = torch.empty(W * nbytes, dtype=torch.uint8, device=cluster.device)
        own = torch.empty(nbytes, dtype=torch.uint8, device=cluster.device)

        def to_all(target: Tensor = target, source: Tensor = source) -> None:
            dist.all_to_all_single(target, source)

        def gather(gathered: Tensor = gathered, own: Tensor = own) -> None:
            all_gather(gathered, own)

        # Bytes that leave each rank: its own part stays; all_gather sends a row to every other rank.
        for name, call, sent in (("all_to_all", to_all, (W - 1) * part), ("all_gather", gather, (W - 1) * nbytes)):
            us = max(cluster.gather(cluster.us(call)))
            yield CollectiveTime(name, nbytes, us, sent / us * 1e6)


def measure_layer(cluster: Cluster, shape: LayerShape, tokens: list[int], check_tokens: int) -> Iterator[LayerTime]:
    """Every dispatcher for numbers of tokens on each rank, with random experts; checked up to `check_tokens`."""
    device, W, S = cluster.device, cluster.num_ranks, shape.experts_per_rank
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = [expert_weights(cluster.rank * S + slot, shape, dtype, device) for slot in range(S)]
    w13_SGD, w2_SDF = (torch.stack(parts) for parts in zip(*weights, strict=True))
    ways: dict[str, Dispatcher] = make_dispatchers(cluster.group, S)
    ways["padded"] = make_padded(cluster.group, S)
    for count in tokens:
        generator = torch.Generator().manual_seed(cluster.rank)
        x_TD = torch.randn(count, shape.hidden, generator=generator).to(device, dtype)
        slot_TK = torch.rand(count, W * S, generator=generator).argsort(1)[:, : shape.top_k].to(device)
        weights_TK = torch.rand(count, shape.top_k, generator=generator).to(device)
        expected_TD = None
        if count <= check_tokens:
            expected_TD = reference(x_TD, slot_TK, weights_TK, shape)
        for name, way in ways.items():

            def run(
                way: Dispatcher = way, x: Tensor = x_TD, slots: Tensor = slot_TK, shares: Tensor = weights_TK
            ) -> Tensor:
                sent = way.dispatch(x, slots, [len(x)] * W)
                y_RD = ops.grouped_mlp(sent.x_ND, sent.row_R, sent.counts_S, w13_SGD, w2_SDF)
                return way.combine(y_RD, sent, shares)

            error = None
            if expected_TD is not None:
                difference = (run().float() - expected_TD).abs().max() / expected_TD.abs().max()
                error = max(cluster.gather(float(difference.nan_to_num(torch.inf))))
            yield LayerTime(name, count, max(cluster.gather(cluster.us(run))), error)


def expert_weights(expert: int, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """`w13 [2 F, D]` and `w2 [D, F]` of an expert, the same on every rank."""
    generator = torch.Generator().manual_seed(1_000_003 + expert)
    w13 = torch.randn(2 * shape.intermediate, shape.hidden, generator=generator) * shape.hidden**-0.5
    w2 = torch.randn(shape.hidden, shape.intermediate, generator=generator) * shape.intermediate**-0.5
    return w13.to(device, dtype), w2.to(device, dtype)


def reference(x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor, shape: LayerShape) -> Tensor:
    """The layer's sum in float32 with all experts here, one at a time."""
    out_TD = torch.zeros(x_TD.shape, device=x_TD.device)
    one = torch.ones(1, dtype=torch.int64, device=x_TD.device)
    for expert in slot_TK.unique().tolist():
        w13, w2 = expert_weights(expert, shape, x_TD.dtype, x_TD.device)
        for token, k in (slot_TK == expert).nonzero().tolist():
            row = ops.grouped_mlp(x_TD[token : token + 1], None, one, w13[None], w2[None])
            out_TD[token] += row[0].float() * weights_TK[token, k]
    return out_TD
