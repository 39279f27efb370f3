"""Angles of the rotary position embedding.

Shape suffixes: T tokens, r rotary dimensions.
"""

from __future__ import annotations

import math
from operator import truediv

import torch
from torch import Tensor

from moe_runtime.config.model import RopeConfig, yarn_magnitude

TABLE_STEP = 4096  # positions


class RotaryEmbedding:
    """Angles of the rotary embedding (Su et al. 2021) with the context extensions of HF's configs.

    With "dynamic" scaling the base depends on the sequence length: the prompt's length for the whole prompt, then one
    more for each new token, as transformers does in generation. It is a function of (prompt length, position), so
    chunked prefill, batching and replay do not change it.
    """

    def __init__(self, rope: RopeConfig, device: torch.device) -> None:
        self.rope = rope
        self._table: tuple[Tensor, Tensor] | None = None
        self.exponent = torch.arange(0, rope.rotary_dim, 2, device=device).float() / rope.rotary_dim
        self.inv_freq, self.scale = _frequencies(rope, self.exponent)

    def rows(
        self, position_T: Tensor, num_prompt_T: Tensor, num_positions: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`cos_Nr, sin_Nr, row_T`: float32 angles, and the row of each token; None if each token has its own row.

        `num_positions` is above all positions. If angles depend on the position alone, they are from a table that
        grows as needed.
        """
        if self.rope.kind == "dynamic":
            return *self(position_T, num_prompt_T), None
        if self._table is None or self._table[0].shape[0] < num_positions:
            length = -(-num_positions // TABLE_STEP) * TABLE_STEP
            positions = torch.arange(length, device=position_T.device)
            self._table = self(positions, positions)
        return *self._table, position_T

    def query_scale(self, position_T: Tensor) -> Tensor | None:
        """Factor on the queries of latent attention at these positions, float32; None: no factor."""
        if self.rope.query_scale is None:
            return None
        beta, length = self.rope.query_scale
        return 1.0 + beta * torch.log1p((position_T // length).float())

    def __call__(self, position_T: Tensor, num_prompt_T: Tensor) -> tuple[Tensor, Tensor]:
        """`cos_Tr, sin_Tr` in float32 for tokens at these positions of sequences with prompts of these lengths."""
        inv_freq = self.inv_freq
        if self.rope.kind == "dynamic":
            inv_freq = self._dynamic(torch.maximum(position_T + 1, num_prompt_T))
        # Powers and angles in float64: in float32, the ends of torch's loops differ in the last bits from the rest.
        angle = (position_T[:, None].float() * inv_freq).double()
        cos, sin = (angle.cos() * self.scale).float(), (angle.sin() * self.scale).float()
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    def _dynamic(self, length_T: Tensor) -> Tensor:
        rope = self.rope
        length = length_T.clamp(min=rope.original_max_position).double()
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        base_T = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
        return (1.0 / base_T[:, None] ** self.exponent.double()).float()


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
    """Llama 3.1: long wavelengths are scaled, short ones kept, those between interpolated."""
    turns = rope.original_max_position * inv_freq / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq


def _yarn(rope: RopeConfig, inv_freq: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): dimensions are interpolated by their number of turns within the trained context."""
    dim = rope.rotary_dim

    def dim_of(turns: float) -> float:
        return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = torch.arange(dim // 2, device=inv_freq.device).float().sub(low) / (high - low or 0.001)
    interpolated = ramp.clamp(0.0, 1.0)
    inv_freq = inv_freq / rope.factor * interpolated + inv_freq * (1 - interpolated)

    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        magnitudes = (yarn_magnitude(rope.factor, mscale) for mscale in (rope.mscale, rope.mscale_all_dim))
        return inv_freq, truediv(*magnitudes)
    return inv_freq, yarn_magnitude(rope.factor, 1.0)
