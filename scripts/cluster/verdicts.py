"""Verdicts of `check_cluster.py` on its measurements: "ok", "look" (slower than it should be), "wrong" (must not be
used like this)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.measure import CollectiveTime, LayerTime, Link, RankFacts
from moe_runtime.memory.graph_buckets import ALL_GATHER_MAX_TOKENS

SLOW_LINK = 0.5  # share of the median bandwidth of its kind, within a host or between hosts
SLOW_RANK = 1.2  # times the median time of the matrix product
LOW_SHARE = 0.5  # share of the slowest link's bandwidth, in the largest all-to-all
LATENCY_US = {False: 100.0, True: 250.0}  # of the smallest collective between GPUs; True: between hosts
WORTH = 1.3  # another dispatcher must be this many times as fast to be mentioned
TOLERANCE = {"cuda": 2e-2, "cpu": 1e-5}  # bfloat16 and float32


@dataclass(frozen=True)
class Verdict:
    """One line."""

    level: Literal["ok", "look", "wrong"]
    what: str
    text: str


def judge(
    device: str,
    ranks: Sequence[RankFacts],
    links: Sequence[Link],
    collectives: Sequence[CollectiveTime],
    layers: Sequence[LayerTime],
) -> list[Verdict]:
    """All verdicts; `device` is "cuda" or "cpu"."""
    return [
        *judge_ranks(ranks),
        *judge_links(device, ranks, links),
        *judge_collectives(device, ranks, links, collectives),
        *judge_layers(device, layers),
    ]


def judge_ranks(ranks: Sequence[RankFacts]) -> Iterator[Verdict]:
    """Same versions, same devices, same speed."""
    for name in ranks[0].versions:
        found = {rank.rank: rank.versions.get(name, "none") for rank in ranks}
        if len(set(found.values())) > 1:
            yield Verdict("wrong", "versions", f"{name} differs: {_by_value(found)}; install one on all hosts")
    memory = {rank.rank: f" with {rank.memory_bytes / 1e9:.0f} GB" if rank.memory_bytes else "" for rank in ranks}
    devices = {rank.rank: rank.device + memory[rank.rank] for rank in ranks}
    if len(set(devices.values())) > 1:
        yield Verdict("look", "devices", f"they differ: {_by_value(devices)}; every step waits for the slowest")
    else:
        yield Verdict("ok", "devices", f"{len(ranks)} times {devices[0]} on {len({r.host for r in ranks})} host(s)")
    median = statistics.median(rank.matrix_us for rank in ranks)
    slow = [rank for rank in ranks if rank.matrix_us > SLOW_RANK * median]
    for rank in slow:
        yield Verdict(
            "look", "compute",
            f"rank {rank.rank} on {rank.host} multiplies {rank.matrix_us / median:.1f}x slower than the median; look "
            "for other processes there, a lower power limit, heat",
        )  # fmt: skip
    if not slow:
        yield Verdict("ok", "compute", "all ranks multiply equally fast")


def judge_links(device: str, ranks: Sequence[RankFacts], links: Sequence[Link]) -> Iterator[Verdict]:
    """Direct memory access within a host, and no link much slower than the others of its kind."""
    hosts = {rank.rank: rank.host for rank in ranks}
    if device == "cuda":
        apart = [
            f"{rank.rank} and {other.rank}"
            for rank in ranks
            for other in ranks
            if rank.rank < other.rank and rank.host == other.host and other.rank not in rank.peers
        ]
        if apart:
            yield Verdict(
                "look", "links",
                f"no direct access between ranks {', '.join(apart)}: their rows go over the host's memory; see "
                "`nvidia-smi topo -m`, and whether the container shares IPC",
            )  # fmt: skip
    kinds: dict[bool, list[Link]] = defaultdict(list)
    for link in links:
        kinds[hosts[link.source] == hosts[link.target]].append(link)
    for within, group in kinds.items():
        kind = "within a host" if within else "between hosts"
        median = statistics.median(link.bytes_per_s for link in group)
        slow = [link for link in group if link.bytes_per_s < SLOW_LINK * median]
        if slow:
            names = ", ".join(f"{link.source} to {link.target} ({link.bytes_per_s / 1e9:.2g} GB/s)" for link in slow)
            yield Verdict("look", "links", f"{kind}, slower than half of the median {median / 1e9:.3g} GB/s: {names}")
        else:
            yield Verdict("ok", "links", f"{len(group)} {kind}, median {median / 1e9:.3g} GB/s, none below half of it")


def judge_collectives(
    device: str, ranks: Sequence[RankFacts], links: Sequence[Link], times: Sequence[CollectiveTime]
) -> Iterator[Verdict]:
    """The latency of the smallest collective, and the share of the slowest link that the largest all-to-all reaches."""
    between_hosts = len({rank.host for rank in ranks}) > 1
    smallest = max((t for t in times if t.nbytes == min(t.nbytes for t in times)), key=lambda t: t.us)
    limit = LATENCY_US[between_hosts]
    text = f"{smallest.name} of {smallest.nbytes} bytes takes {smallest.us:.0f} us"
    if device == "cuda" and smallest.us > limit:
        yield Verdict(
            "look", "latency",
            f"{text}, more than the {limit:.0f} us to be expected; a decode step pays it twice in every sparse layer. "
            "NCCL_DEBUG=INFO shows which transport was taken",
        )  # fmt: skip
    else:
        yield Verdict("ok", "latency", text)
    if links:
        largest = max((t for t in times if t.name == "all_to_all"), key=lambda t: t.nbytes)
        share = largest.bytes_per_s / min(link.bytes_per_s for link in links)
        text = f"the largest all_to_all sends {largest.bytes_per_s / 1e9:.3g} GB/s from each rank"
        level: Literal["ok", "look"] = "look" if device == "cuda" and share < LOW_SHARE else "ok"
        yield Verdict(level, "bandwidth", f"{text}, {share:.2f} of the slowest link alone")


def judge_layers(device: str, layers: Sequence[LayerTime]) -> Iterator[Verdict]:
    """Correct results from every dispatcher, and whether `dispatcher="auto"` takes the fastest."""
    checked = [layer for layer in layers if layer.error is not None]
    bad = [layer for layer in checked if layer.error is not None and not layer.error <= TOLERANCE[device]]
    for layer in bad:
        text = f"{layer.dispatcher} with {layer.tokens} tokens a rank is off by {layer.error:.2g} of the largest output"
        yield Verdict("wrong", "layer", text)
    if checked and not bad:
        yield Verdict(
            "ok", "layer", f"{len(checked)} results of {len({c.dispatcher for c in checked})} dispatchers right"
        )
    by_tokens: dict[int, dict[str, float]] = defaultdict(dict)
    for layer in layers:
        by_tokens[layer.tokens][layer.dispatcher] = layer.us
    for tokens, times in by_tokens.items():
        chosen = "all_gather" if tokens <= ALL_GATHER_MAX_TOKENS else "all_to_all"
        other = "all_to_all" if chosen == "all_gather" else "all_gather"
        if times[chosen] > WORTH * times[other]:
            yield Verdict(
                "look", "dispatcher",
                f"with {tokens} tokens a rank, {other} takes {times[other]:.0f} us and {chosen}, which "
                f"\"auto\" chooses, {times[chosen]:.0f} us; dispatcher={other} may be faster here",
            )  # fmt: skip


def _by_value(values: dict[int, str]) -> str:
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, value in values.items():
        ranks[value].append(rank)
    return ", ".join(f"{value} (ranks {', '.join(map(str, of))})" for value, of in ranks.items())
