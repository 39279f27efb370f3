"""Slow, obvious twins of `moe_runtime.layers.capacity`, on lists of numbers."""

from __future__ import annotations

import math

import torch


def over_capacity(experts: list[list[int]], room: int) -> list[list[bool]]:
    """Which assignments exceed their expert's capacity: all first choices come first, then all second, and so on."""
    taken: dict[int, int] = {}
    over = [[False] * len(row) for row in experts]
    for k in range(len(experts[0]) if experts else 0):
        for token, row in enumerate(experts):
            if row[k] >= 0:
                over[token][k] = taken.get(row[k], 0) >= room
                taken[row[k]] = taken.get(row[k], 0) + 1
    return over


def drop(experts: list[list[int]], room: int) -> tuple[list[list[int]], list[int]]:
    over = over_capacity(experts, room)
    kept = [[-1 if full else e for e, full in zip(*rows, strict=True)] for rows in zip(experts, over, strict=True)]
    return kept, [sum(row) for row in over]


def others(choice: list[float], used: list[int]) -> list[int]:
    """The experts that a token may still choose, best first."""
    free = [e for e, value in enumerate(choice) if e not in used and value > -math.inf]
    return sorted(free, key=lambda e: (-choice[e], e))


def reroute(
    choice: list[list[float]], experts: list[list[int]], room: int
) -> tuple[list[list[int]], list[int], list[int]]:
    num_tokens, num_experts = len(choice), len(choice[0])
    over = over_capacity(experts, room)
    placed, dropped = drop(experts, room)
    held = [sum(row.count(e) for row in placed) for e in range(num_experts)]
    waiting = [[k for k, full in enumerate(row) if full] for row in over]
    to_ask = [others(choice[token], experts[token]) for token in range(num_tokens)]
    rerouted = [0] * num_tokens
    while any(waiting[token] and to_ask[token] for token in range(num_tokens)):
        asked = [to_ask[token].pop(0) if waiting[token] and to_ask[token] else None for token in range(num_tokens)]
        for token, expert in enumerate(asked):
            if expert is not None and held[expert] < room:
                held[expert] += 1
                placed[token][waiting[token].pop(0)] = expert
                rerouted[token] += 1
                dropped[token] -= 1
    return placed, rerouted, dropped


def prefer_light_ranks(
    scores: list[list[float]],
    choice: list[list[float]],
    experts: list[list[int]],
    rank_of: list[int],
    rows: list[float],
    epsilon: float,
) -> tuple[list[list[int]], list[int]]:
    mean = sum(rows) / len(rows)
    used = [e for row in experts for e in row if e >= 0]
    gives = [
        math.ceil(sum(rank_of[e] == rank for e in used) * (1 - mean / load)) if load > mean else 0
        for rank, load in enumerate(rows)
    ]
    takes = [math.ceil(len(used) * ((mean - load) / sum(rows))) if load < mean else 0 for load in rows]
    wishes = []
    for token, row in enumerate(experts):
        heavy = [k for k, e in enumerate(row) if e >= 0 and rank_of[e] >= 0 and rows[rank_of[e]] > mean]
        light = [e for e in others(choice[token], row) if rank_of[e] >= 0 and rows[rank_of[e]] < mean]
        if heavy and light:
            ours, theirs = (torch.tensor(scores[token][e]) for e in (row[heavy[-1]], light[0]))
            if theirs >= (1 - epsilon) * ours:
                wishes.append((token, heavy[-1], light[0]))
    leaving = []
    for token, k, expert in wishes:
        rank = rank_of[experts[token][k]]
        if gives[rank] > 0:
            gives[rank] -= 1
            leaving.append((token, k, expert))
    after, moved = [list(row) for row in experts], [0] * len(experts)
    for token, k, expert in leaving:
        if takes[rank_of[expert]] > 0:
            takes[rank_of[expert]] -= 1
            after[token][k] = expert
            moved[token] = 1
    return after, moved
