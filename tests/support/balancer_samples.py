"""Random placements and loads for the tests of the balancer."""

import numpy as np
from hypothesis import settings

from moe_runtime.balancer import ExpertLoad, Placement

NO_DEADLINE = settings(deadline=None)  # a busy machine must not fail a test


def random_placement(rng, layer_ids, num_experts, num_ranks, num_spare):
    """Every expert has a slot; some spare slots hold replicas, some are empty; each layer differs."""
    num_ranks = min(num_ranks, num_experts)
    max_slots = -(-num_experts // num_ranks) + num_spare
    slots = np.full((len(layer_ids), num_ranks, max_slots), -1, np.int32)
    for layer in range(len(layer_ids)):
        for rank, experts in enumerate(np.array_split(rng.permutation(num_experts), num_ranks)):
            others = np.setdiff1d(np.arange(num_experts), experts)
            replicas = rng.permutation(others)[: rng.integers(0, num_spare + 1)]
            held = np.concatenate([experts, replicas])
            slots[layer, rank, rng.permutation(max_slots)[: len(held)]] = held
    return Placement(slots, num_experts, layer_ids, int(rng.integers(0, 9)))


def random_load(seed, num_layers=4, num_experts=8, num_ranks=2, num_spare=0, top_k=2, num_tokens=(300, 40), **fields):
    """Skewed counts, as from a gate with fixed preferences: each token uses `top_k` experts of each layer."""
    rng = np.random.default_rng(seed)
    layer_ids = tuple(int(layer) for layer in np.cumsum(rng.integers(1, 3, num_layers)))
    preference = rng.normal(size=(num_layers, 1, num_experts)) * 1.5
    tokens = {}
    for phase, count in zip(("prefill", "decode"), num_tokens, strict=True):
        scores = preference + rng.gumbel(size=(num_layers, count, num_experts))
        chosen = np.argsort(-scores, axis=2)[..., :top_k]
        tokens[phase] = np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in chosen])
    placement = random_placement(rng, layer_ids, num_experts, num_ranks, num_spare) if num_ranks else None
    return ExpertLoad(tokens, layer_ids, placement, **{"model": "demo", "top_k": top_k, **fields})
