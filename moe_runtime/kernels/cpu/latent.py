"""Multi-head latent attention as one native call; see `latent.h` and `config.attention.LatentAttentionConfig`.

Shape suffixes are those of `native`; L latent, n and r a head's query without and with rotation, v a head's value.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_runtime.kernels.cpu import structs
from moe_runtime.kernels.cpu.blocks import NextNorm, next_norm_struct, residual_pointer
from moe_runtime.kernels.cpu.kv_pages import kv_pages
from moe_runtime.kernels.cpu.native import Kernels
from moe_runtime.kernels.cpu.native_step import NativeStep, pointer
from moe_runtime.kernels.cpu.packed import PackedLinear, PackedMatrices
from moe_runtime.kernels.cpu.structs import AttentionShape, LatentSizes, Weight
from moe_runtime.kernels.kv_rows import KVScales


class LatentCall:
    """From normed hidden states to the attention's output, over a cache of latents and shared keys.

    Args:
        down: projection to the compressed queries (or to the queries), the latent and the shared key.
        up: from the compressed queries to the queries, or None.
        key, value: matrices of each head, `[L, n]` and `[v, L]`.
        output: projection from `H * v`.
        query_norm: weights of the norm on compressed queries, or None.
        latent_norm: weights `[L]`.
        rope_size: r.
        eps: of these norms.
        next_norm: the norm after the block, or None.
    """

    def __init__(
        self,
        kernels: Kernels,
        down: PackedLinear,
        up: PackedLinear | None,
        key: PackedMatrices,
        value: PackedMatrices,
        output: PackedLinear,
        *,
        query_norm: Tensor | None,
        latent_norm: Tensor,
        rope_size: int,
        scale: float,
        eps: float,
        next_norm: NextNorm | None = None,
    ) -> None:
        (num_heads, _), latent, nope = key.data.shape, key.outputs, key.inputs
        rank, key_size = 0 if up is None else up.inputs, latent + rope_size
        assert len(value.data) == num_heads and value.inputs == latent
        assert output.inputs == num_heads * value.outputs
        assert up is None or up.outputs == num_heads * (nope + rope_size)
        assert down.outputs == (rank or num_heads * (nope + rope_size)) + key_size
        self.kernels, self.output, self.next_norm = kernels, output, next_norm
        shape = AttentionShape(
            heads=num_heads,
            kv_heads=1,
            head_size=key_size,
            value_size=latent,
            shared=True,
            scale=scale,
        )
        self.struct = structs.LatentStruct(
            next=next_norm_struct(next_norm),
            shape=shape,
            sizes=LatentSizes(rank, latent, nope, rope_size),
            down=down.weight,
            down_bias=pointer(down.bias),
            query_norm=pointer(query_norm),
            latent_norm=pointer(latent_norm),
            eps=eps,
            up=Weight() if up is None else up.weight,
            key=key.weight,
            value=value.weight,
            output=output.weight,
            output_bias=pointer(output.bias),
        )
        self.address = ctypes.addressof(self.struct)
        self.dtype = down.dtype
        self.element = down.element
        self.parts = (down, key, value, output) if up is None else (down, up, key, value, output)
        self._keep = (query_norm, latent_norm)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __call__(
        self,
        x_TD: Tensor,
        step: NativeStep,
        cache_NB1d: Tensor,
        residual_TD: Tensor | None = None,
        *,
        kv_scales: KVScales | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """`[T, D]`; with `in_place` it overwrites `x_TD`. Writes the tokens' latents and keys into the cache.

        `kv_scales` are those of a cache whose rows have 8 bits.
        """
        assert x_TD.dtype == self.dtype and len(x_TD) == step.layout.tokens
        assert kv_scales is not None or cache_NB1d.dtype == self.dtype
        pages = kv_pages(cache_NB1d, cache_NB1d[..., : self.struct.shape.value_size], kv_scales)
        out_TD = x_TD if in_place else torch.empty(len(x_TD), self.output.outputs, dtype=self.dtype)
        assert out_TD.shape == (len(x_TD), self.output.outputs)
        self.kernels.library.moe_latent_block(
            self.element,
            self.address,
            step.address,
            step.heads_address,
            pointer(x_TD),
            ctypes.addressof(pages),
            residual_pointer(self.next_norm, residual_TD, out_TD),
            out_TD.data_ptr(),
        )
        return out_TD
