"""Attention in torch, on any device; `layers.native_layers` has the same on the native CPU kernels.

Shape suffixes: T tokens, D hidden, H query heads, G key/value heads, d key size, e value size, I = H * d, J = G * d,
r rotary dims; in latent attention L latent, n a head's query without rotation, v a head's value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.config.attention import AttentionConfig, LatentAttentionConfig
from moe_runtime.kernels import ops
from moe_runtime.kernels.attention import DecodeRows
from moe_runtime.kernels.forms import Forms
from moe_runtime.layers.kit import Norm
from moe_runtime.layers.kv_cache import LayerCache
from moe_runtime.layers.torch_layers import TorchLinear


@dataclass(frozen=True)
class AttentionStep:
    """A step's inputs to attention: angles and factors in float32, cache positions, pages."""

    cos_Tr: Tensor
    sin_Tr: Tensor
    cache_position_T: Tensor
    metadata: ops.AttentionMetadata | DecodeRows
    query_scale_T: Tensor | None


class TorchAttention:
    """Grouped-query attention over the paged cache, with optional norms on queries and keys (`config.qk_norm`).

    Args:
        config: of the layer.
        eps: of the norms on queries and keys.
        qkv: projection to `(H + 2 G) * d`; query rows, key rows, value rows.
        output: output projection.
        q_norm, k_norm: weights of the sizes `config.norm_sizes`, or None.
        sinks_H: float32, each head's sink, or None.
        next_norm: the norm after it.
        forms: of the attention itself.
    """

    def __init__(
        self,
        config: AttentionConfig,
        eps: float,
        qkv: TorchLinear,
        output: TorchLinear,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        sinks_H: Tensor | None,
        next_norm: Norm,
        forms: Forms,
    ) -> None:
        self.config = config
        self.eps = eps
        self.qkv = qkv
        self.output = output
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.sinks_H = sinks_H
        self.next_norm = next_norm
        self.forms = forms

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.output.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: object, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Attend from each token to its sequence so far; first writes the tokens' keys and values into the cache."""
        assert isinstance(step, AttentionStep)
        config, norm = self.config, self.config.qk_norm
        q_TI, k_TJ, v_TJ = self.qkv(x_TD).split((config.query_size, config.kv_size, config.kv_size), dim=1)
        if norm == "token":
            q_TI, k_TJ = self._norm(q_TI, k_TJ)
        q_THd, k_TGd, v_TGd = (rows.unflatten(1, (-1, config.head_dim)) for rows in (q_TI, k_TJ, v_TJ))
        if norm == "head":
            q_THd, k_TGd = self._norm(q_THd, k_TGd)
        angles, pages = (step.cos_Tr, step.sin_Tr), (cache.k_NBGd, cache.v_NBGe, step.cache_position_T)
        if norm == "rotated_head":
            q_THd, k_TGd = self._norm(*ops.apply_rotary(q_THd, k_TGd, *angles))
            ops.store_kv(k_TGd, v_TGd, *pages, cache.scales)
        else:
            q_THd = ops.rotary_store_kv(q_THd, k_TGd, v_TGd, *angles, *pages, cache.scales)
        out_THd = attend(
            self.forms,
            q_THd,
            cache,
            step.metadata,
            scale=config.softmax_scale,
            sliding_window=config.sliding_window,
            sinks_H=self.sinks_H,
        )
        return self.next_norm.add(self.output(out_THd.flatten(1)), residual_TD)

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None and self.k_norm is not None
        return ops.rms_norm(q, self.q_norm, self.eps), ops.rms_norm(k, self.k_norm, self.eps)


class TorchHeadMatrices:
    """A matrix `[O, I]` of each attention head."""

    def __init__(self, weight_HOI: Tensor) -> None:
        self.weight_HOI = weight_HOI

    @property
    def nbytes(self) -> int:
        return self.weight_HOI.nbytes

    def put(self, head: int, first_row: int, weight_OI: Tensor) -> None:
        """Fill the outputs of one head from `first_row` on."""
        self.weight_HOI[head, first_row : first_row + len(weight_OI)] = weight_OI


class TorchLatentAttention:
    """Latent attention over the paged cache of latents and shared keys; see `LatentAttentionConfig`.

    Args:
        down, up, key, value, output: see `Kit.latent_attention`.
        query_norm, latent_norm: weights; None without compressed queries.
        next_norm: the norm after it.
        forms: of the products of heads and of the attention itself.
    """

    def __init__(
        self,
        config: LatentAttentionConfig,
        down: TorchLinear,
        up: TorchLinear | None,
        key: TorchHeadMatrices,
        value: TorchHeadMatrices,
        output: TorchLinear,
        query_norm: Tensor | None,
        latent_norm: Tensor,
        next_norm: Norm,
        forms: Forms,
    ) -> None:
        self.config = config
        self.down = down
        self.up = up
        self.key = key
        self.value = value
        self.output = output
        self.query_norm = query_norm
        self.latent_norm = latent_norm
        self.next_norm = next_norm
        self.forms = forms

    @property
    def nbytes(self) -> int:
        parts = (self.down, self.up, self.key, self.value, self.output)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: object, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Attend from each token to its sequence so far; first writes the tokens' latents and keys into the cache."""
        assert isinstance(step, AttentionStep)
        config = self.config
        sizes = (config.query_rank or config.query_size, config.latent_size, config.rope_size)
        query_TI, latent_TL, key_Tr = self.down(x_TD).split(sizes, dim=1)
        if self.up is not None and self.query_norm is not None:
            query_TI = self.up(ops.rms_norm(query_TI, self.query_norm, config.norm_eps))
        query_THI = query_TI.unflatten(1, (config.num_heads, -1))
        query_THn, query_THr = query_THI.split((config.nope_size, config.rope_size), dim=2)
        query_THr, key_T1r = ops.apply_rotary(query_THr, key_Tr[:, None], step.cos_Tr, step.sin_Tr)
        latent_TL = ops.rms_norm(latent_TL, self.latent_norm, config.norm_eps)
        row_T1d = torch.cat((latent_TL[:, None], key_T1r), dim=2)
        if cache.scales is None:
            cache.k_NBGd.flatten(0, 1).index_copy_(0, step.cache_position_T, row_T1d)
        else:
            parts = (config.latent_size, config.rope_size)
            ops.store_quantized(row_T1d, cache.k_NBGd, cache.scales.k_NBGP, step.cache_position_T, parts)

        query_THd = torch.cat((self.forms.head_products(query_THn, self.key.weight_HOI), query_THr), dim=2)
        if step.query_scale_T is not None:
            query_THd = (query_THd.float() * step.query_scale_T[:, None, None]).to(query_THd.dtype)
        sum_THL = attend(self.forms, query_THd, cache, step.metadata, scale=config.scale, sliding_window=None)
        value_THv = self.forms.head_products(sum_THL, self.value.weight_HOI)
        return self.next_norm.add(self.output(value_THv.flatten(1)), residual_TD)


def attend(
    forms: Forms,
    q_THd: Tensor,
    cache: LayerCache,
    meta: ops.AttentionMetadata | DecodeRows,
    *,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of a step's rows, `[T, H, e]`; padded steps attend row by row."""
    if isinstance(meta, DecodeRows):
        return ops.decode_attention(
            q_THd,
            cache.k_NBGd,
            cache.v_NBGe,
            meta.page_table,
            meta.sequence_T,
            meta.position_T,
            max_context=meta.max_context,
            scale=scale,
            sliding_window=sliding_window,
            sinks_H=sinks_H,
            kv_scales=cache.scales,
        )
    return forms.paged_attention(
        q_THd,
        cache.k_NBGd,
        cache.v_NBGe,
        meta,
        scale=scale,
        sliding_window=sliding_window,
        sinks_H=sinks_H,
        kv_scales=cache.scales,
    )
