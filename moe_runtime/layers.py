"""Building blocks of a decoder: linear maps, dense MLP, rotary embedding, attention over the paged cache.

Shape suffixes: T tokens, D hidden, H query heads, G key/value heads, d head dim, r rotary dims.
Blocks are plain objects that hold tensors and are called; what a step brings comes as arguments.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_runtime.config import ModelConfig, RopeConfig
from moe_runtime.kernels import ops
from moe_runtime.kv_cache import LayerCache


class Linear:
    """`x @ weight.T + bias`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MLP:
    """SwiGLU: `down(silu(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate_up(x_TD)))


class RotaryEmbedding:
    """Angles of the rotary embedding (Su et al. 2021) with the context extensions of HF's configs.

    With "dynamic" scaling the base follows the length of the sequence: the prompt's for all of the prompt, then one
    more for each new token, as transformers does while it generates. It is a function of (prompt length, position), so
    chunked prefill, batching and replay do not change it.
    """

    def __init__(self, rope: RopeConfig, device: torch.device) -> None:
        self.rope = rope
        self.exponent = torch.arange(0, rope.rotary_dim, 2, device=device).float() / rope.rotary_dim
        self.inv_freq, self.scale = _frequencies(rope, self.exponent)

    def __call__(self, position_T: Tensor, num_prompt_T: Tensor) -> tuple[Tensor, Tensor]:
        """`cos_Tr, sin_Tr` in float32 for tokens at these positions of sequences with prompts of these lengths."""
        inv_freq = self.inv_freq
        if self.rope.kind == "dynamic":
            inv_freq = self._dynamic(torch.maximum(position_T + 1, num_prompt_T))
        angle = position_T[:, None].float() * inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.scale, angle.sin() * self.scale

    def _dynamic(self, length_T: Tensor) -> Tensor:
        rope = self.rope
        length = length_T.clamp(min=rope.original_max_position)
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        base_T = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
        return 1.0 / base_T[:, None] ** self.exponent


def _frequencies(rope: RopeConfig, exponent: Tensor) -> tuple[Tensor, float]:
    """Inverse frequencies `[r / 2]` and the factor on cos and sin."""
    inv_freq = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inv_freq)
    return inv_freq, 1.0


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between interpolated."""
    turns = rope.original_max_position * inv_freq / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq


def _yarn(rope: RopeConfig, inv_freq: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): dimensions are interpolated by how often they turn within the trained context."""
    dim = rope.rotary_dim

    def dim_of(turns: float) -> float:
        return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = torch.arange(dim // 2, device=inv_freq.device).float().sub(low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0.0, 1.0)
    inv_freq = inv_freq / rope.factor * interpolated + inv_freq * (1 - interpolated)

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inv_freq, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return inv_freq, magnitude(1.0)


class Attention:
    """Grouped-query attention over the paged cache, with optional norms on queries and keys.

    Args:
        config: the model's.
        qkv: projection to `(H + 2 G) * d`; query rows, key rows, value rows.
        output: projection back.
        q_norm, k_norm: weights `[d]`, or None.
    """

    def __init__(
        self, config: ModelConfig, qkv: Linear, output: Linear, q_norm: Tensor | None, k_norm: Tensor | None
    ) -> None:
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.sliding_window = config.sliding_window
        self.qkv = qkv
        self.output = output
        self.q_norm = q_norm
        self.k_norm = k_norm

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.output.nbytes

    def __call__(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache,
        slot_T: Tensor,
        metadata: ops.AttentionMetadata,
    ) -> Tensor:
        """Attend from each token to its sequence so far; the tokens' own keys and values go into the cache first."""
        heads = self.qkv(x_TD).view(x_TD.shape[0], sum(self.heads), self.head_dim)
        q_THd, k_TGd, v_TGd = heads.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THd = ops.rms_norm(q_THd, self.q_norm, self.eps)
            k_TGd = ops.rms_norm(k_TGd, self.k_norm, self.eps)
        q_THd, k_TGd = ops.apply_rotary(q_THd, k_TGd, *rope)
        ops.store_kv(k_TGd, v_TGd, cache.k_NBGd, cache.v_NBGd, slot_T)
        out_THd = ops.paged_attention(
            q_THd,
            cache.k_NBGd,
            cache.v_NBGd,
            metadata,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
        )
        return self.output(out_THd.flatten(1))
