"""How many weights, cached values and multiplications a model has, from its `config.json`. No torch.

All counts are lower bounds for any engine. Latent attention may keep latents and apply a head's key and value matrices
to queries and results, or keep keys and values: the first keeps least, the second multiplies least, and each counts
with its least. Where a layer has a window, only the keys within it count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model.

    Attributes:
        dense: what all tokens use in all layers: attention, norms, gates, shared experts, dense layers; read by every
            step on each rank that has a sequence.
        head: read by every step, and multiplied once per sequence.
        expert: one expert of one layer.
        expert_rows: rows that one token sends to experts, over all layers.
        kv: cached values of one token, all layers without a window.
        scores: multiply-adds of one query with one key and one value, all heads and layers without a window.
        window: keys that a layer with a window sees at most.
        window_kv, window_scores: as `kv` and `scores`, for the layers with a window.
    """

    dense: int
    head: int
    expert: int
    expert_rows: int
    kv: int
    scores: int
    window: int = 0
    window_kv: int = 0
    window_scores: int = 0

    @classmethod
    def of(cls, config: Config) -> Sizes:
        """From the `config.json` of a bench model; without a `model_type` it is a `qwen3_moe`."""
        return _FAMILIES[config.get("model_type", "qwen3_moe")](config)

    def kept(self, context: float) -> float:
        """Cached values that a token with `context` keys reads."""
        return context * self.kv + min(context, self.window) * self.window_kv

    def step_scores(self, context: float) -> float:
        """Multiply-adds of attention for a token with `context` keys."""
        return context * self.scores + min(context, self.window) * self.window_scores

    def prompt_scores(self, length: int) -> float:
        """Multiply-adds of attention for a prompt of `length` tokens; each sees those before it and itself."""
        inside = min(length, self.window)
        windowed = inside * (inside + 1) / 2 + (length - inside) * inside
        return length * (length + 1) / 2 * self.scores + windowed * self.window_scores


def _qwen3_moe(config: Config) -> Sizes:
    hidden, layers, d = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = 2 * hidden * (heads + kv_heads) * d  # query and output, key and value
    return Sizes(
        dense=layers * (attention + hidden * config["num_experts"] + 2 * hidden + 2 * d) + hidden,
        head=hidden * config["vocab_size"],
        expert=3 * hidden * config["moe_intermediate_size"],
        expert_rows=layers * config["num_experts_per_tok"],
        kv=2 * layers * kv_heads * d,
        scores=2 * layers * heads * d,
    )


def _deepseek_v3(config: Config) -> Sizes:
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    rank, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    sparse = layers - config["first_k_dense_replace"]
    down = hidden * (rank + latent + rope) + rank + latent  # with their norms
    up = rank * heads * (nope + rope) + latent * heads * (nope + value)
    attention = down + up + heads * value * hidden
    expert = 3 * hidden * config["moe_intermediate_size"]
    gate = (hidden + 1) * config["n_routed_experts"]
    return Sizes(
        dense=layers * (attention + 2 * hidden)
        + (layers - sparse) * 3 * hidden * config["intermediate_size"]
        + sparse * (gate + config["n_shared_experts"] * expert)
        + hidden,
        head=hidden * config["vocab_size"],
        expert=expert,
        expert_rows=sparse * config["num_experts_per_tok"],
        kv=layers * (latent + rope),
        scores=layers * heads * (nope + rope + value),
    )


def _gpt_oss(config: Config) -> Sizes:
    hidden, inner, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layers, windowed = config["num_hidden_layers"], config["layer_types"].count("sliding_attention")
    attention = 2 * hidden * (heads + kv_heads) * d + (heads + 2 * kv_heads) * d + hidden + heads  # biases, sinks
    gate = (hidden + 1) * config["num_local_experts"]
    kv, scores = 2 * kv_heads * d, 2 * heads * d  # of a layer
    return Sizes(
        dense=layers * (attention + gate + 2 * hidden) + hidden,
        head=hidden * config["vocab_size"],
        expert=3 * hidden * inner + 2 * inner + hidden,
        expert_rows=layers * config["num_experts_per_tok"],
        kv=(layers - windowed) * kv,
        scores=(layers - windowed) * scores,
        window=config["sliding_window"],
        window_kv=windowed * kv,
        window_scores=windowed * scores,
    )


_FAMILIES: dict[str, Callable[[Config], Sizes]] = {
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
