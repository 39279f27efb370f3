"""The carved model's perplexity and expert load on held-out texts, for several k.

Shapes: B blocks, L layers, E experts.
"""

from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Glm4MoeForCausalLM, PreTrainedModel

Counts = NDArray[np.int64]


@torch.inference_mode()
def perplexity(model: PreTrainedModel, blocks: Tensor) -> float:
    """exp of the mean next-token loss over all blocks (B, tokens); the first token of a block is not predicted."""
    losses = [
        F.cross_entropy(model(input_ids=block, use_cache=False).logits[0, :-1], block[0, 1:])
        for block in blocks.split(1)
    ]
    return float(torch.stack(losses).mean().exp())


def set_num_experts_per_tok(model: Glm4MoeForCausalLM, k: int) -> None:
    """Change k of every layer of a loaded model."""
    for layer in model.model.layers:
        layer.mlp.gate.top_k = k


def perplexity_and_load(model: Glm4MoeForCausalLM, blocks: Tensor) -> tuple[float, Counts]:
    """Perplexity of `blocks`, and how many tokens of each block chose each expert (B, L, E)."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    counts = np.zeros((len(blocks), len(gates), gates[0].num_experts), dtype=np.int64)
    calls = [0] * len(gates)

    def count(layer: int, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen = output[2].flatten()
        counts[calls[layer], layer] = torch.bincount(chosen, minlength=counts.shape[2]).numpy()
        calls[layer] += 1

    def hook_of(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            count(layer, output)

        return hook

    handles = [gate.register_forward_hook(hook_of(layer)) for layer, gate in enumerate(gates)]
    value = perplexity(model, blocks)
    for handle in handles:
        handle.remove()
    return value, counts


def max_over_mean(counts_BLE: Counts) -> float:
    """Load of the hottest expert over the mean expert, averaged over the layers."""
    load_LE = counts_BLE.sum(axis=0)
    return float((load_LE.max(axis=1) / load_LE.mean(axis=1)).mean())


def hot_overlap(a_BLE: Counts, b_BLE: Counts, hottest: int = 8) -> float:
    """Share of a layer's `hottest` experts that two kinds of text have in common; by chance it is hottest / E."""
    tops = [np.argsort(-counts.sum(axis=0), axis=1)[:, :hottest] for counts in (a_BLE, b_BLE)]
    return float(np.mean([len(np.intersect1d(a, b)) / hottest for a, b in zip(*tops, strict=True)]))


def total_variation(a_BLE: Counts, b_BLE: Counts) -> float:
    """Half the L1 distance between two distributions of load over the experts, averaged over the layers."""
    shares = [counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, None] for counts in (a_BLE, b_BLE)]
    return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)


def skew_figures(counts: dict[str, Counts]) -> dict[str, Any]:
    """Max over mean per kind; overlap of hot experts and total variation for each pair of kinds, and within a kind."""
    pairs = list(combinations(counts, 2))
    return {
        "max_over_mean": {kind: max_over_mean(counts_BLE) for kind, counts_BLE in counts.items()},
        "hot_overlap": {f"{a} / {b}": hot_overlap(counts[a], counts[b]) for a, b in pairs},
        "total_variation": {f"{a} / {b}": total_variation(counts[a], counts[b]) for a, b in pairs},
        "total_variation_within": {kind: total_variation(c[::2], c[1::2]) for kind, c in counts.items()},
        "hot_overlap_within": {kind: hot_overlap(c[::2], c[1::2]) for kind, c in counts.items()},
    }
