"""Small layers, and a slow computation of the best level, for the tests of planning."""

import numpy as np
from hypothesis import strategies as st


def least_level(load_E, slots_WS, speed_W):
    """The least possible max of load / speed, by trying all sets of ranks (Hall's condition); for few ranks only."""
    num_ranks = len(slots_WS)
    hosts = [{rank for rank in range(num_ranks) if expert in slots_WS[rank]} for expert in range(len(load_E))]
    best = 0.0
    for bits in range(1, 2**num_ranks):
        ranks = {rank for rank in range(num_ranks) if bits >> rank & 1}
        held = sum(load for load, there in zip(load_E, hosts, strict=True) if there <= ranks)
        best = max(best, held / sum(speed_W[rank] for rank in ranks))
    return best


@st.composite
def layer_cases(draw, max_ranks=6, max_experts=12):
    """(load, slots, speed): random loads (some zero, some equal, some of very different size), random valid slots."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    load = draw(st.sampled_from([rng.random, lambda n: rng.integers(0, 4, n) * 1.0, lambda n: rng.lognormal(0, 6, n)]))(
        num_experts
    )
    max_slots = num_experts
    slots = np.full((num_ranks, max_slots), -1)
    homes = rng.integers(0, num_ranks, num_experts)
    density = draw(st.sampled_from([0.0, 0.15, 0.4, 0.9]))
    for rank in range(num_ranks):
        held = (homes == rank) | (rng.random(num_experts) < density)
        slots[rank, rng.permutation(max_slots)[: held.sum()]] = np.flatnonzero(held)
    speed = draw(st.sampled_from([None, rng.uniform(0.3, 3, num_ranks)]))
    return load, slots, speed
