"""Rotary position embedding, the write into the paged cache, and both in one launch.

A program has one token with all its heads. Heads may be inside a projection's output; only a head's own values must be
contiguous. Everything is rounded where the torch twins round it.

Shape suffixes: T tokens, H query heads, G key/value heads, d head size, r rotated dimensions, N pages,
B tokens per page; in the kernels H is a block of heads of one kind, P half of the rotated dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.kv_rows import KVScales
from moe_runtime.kernels.triton.quantized_rows import store_quantized


@triton.jit  # type: ignore[untyped-decorator]
def copy_heads(
    from_ptr: tl.tensor,
    to_ptr: tl.tensor,
    head_stride: tl.tensor,
    num_heads: tl.tensor,
    head_size: tl.tensor,
    first: tl.tensor,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Dimensions `first ..` of each head of one token; `to_ptr` holds the heads one after another."""
    head_H = tl.arange(0, BLOCK_H)
    d_D = first + tl.arange(0, BLOCK_D)
    is_x_HD = (head_H < num_heads)[:, None] & (d_D < head_size)[None, :]
    x_HD = tl.load(from_ptr + head_H[:, None] * head_stride + d_D[None, :], mask=is_x_HD)
    tl.store(to_ptr + head_H[:, None] * head_size + d_D[None, :], x_HD, mask=is_x_HD)


@triton.jit  # type: ignore[untyped-decorator]
def rotate_heads(
    from_ptr: tl.tensor,
    to_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    head_stride: tl.tensor,
    num_heads: tl.tensor,
    head_size: tl.tensor,
    half: tl.tensor,
    HAS_PASSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Rotate each head of one token; the other dimensions are copied."""
    dtype = to_ptr.dtype.element_ty
    head_H = tl.arange(0, BLOCK_H)
    p_P = tl.arange(0, BLOCK_P)
    is_pair_HP = (head_H < num_heads)[:, None] & (p_P < half)[None, :]
    from_HP = from_ptr + head_H[:, None] * head_stride + p_P[None, :]
    first_HP = tl.load(from_HP, mask=is_pair_HP, other=0.0).to(tl.float32)
    second_HP = tl.load(from_HP + half, mask=is_pair_HP, other=0.0).to(tl.float32)
    # Both halves of cos and sin are read, because the twin multiplies with both.
    cos1_P = tl.load(cos_ptr + p_P, mask=p_P < half, other=0.0)
    cos2_P = tl.load(cos_ptr + half + p_P, mask=p_P < half, other=0.0)
    sin1_P = tl.load(sin_ptr + p_P, mask=p_P < half, other=0.0)
    sin2_P = tl.load(sin_ptr + half + p_P, mask=p_P < half, other=0.0)
    turned1_HP = first_HP * cos1_P[None, :] - second_HP * sin1_P[None, :]
    turned2_HP = second_HP * cos2_P[None, :] + first_HP * sin2_P[None, :]
    to_HP = to_ptr + head_H[:, None] * head_size + p_P[None, :]
    tl.store(to_HP, turned1_HP.to(dtype), mask=is_pair_HP)
    tl.store(to_HP + half, turned2_HP.to(dtype), mask=is_pair_HP)
    if HAS_PASSED:
        copy_heads(from_ptr, to_ptr, head_stride, num_heads, head_size, 2 * half, BLOCK_H, BLOCK_D)


@triton.jit  # type: ignore[untyped-decorator]
def rotary_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    v_out_ptr: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    num_q_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    head_size: tl.tensor,
    half: tl.tensor,
    HAS_PASSED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Rotate a token's queries and keys. With `slot_ptr`, keys and values go into the cache. Else it and `v_ptr` are
    `None`, and keys go to the token's own row."""
    token = tl.program_id(0).to(tl.int64)
    place = token if slot_ptr is None else tl.load(slot_ptr + token)
    q_ptr += token * q_token_stride
    k_ptr += token * k_token_stride
    q_out_ptr += token * num_q_heads * head_size
    k_out_ptr += place * num_kv_heads * head_size
    cos_ptr += token * 2 * half
    sin_ptr += token * 2 * half
    rotate_heads(
        q_ptr, q_out_ptr, cos_ptr, sin_ptr, q_head_stride, num_q_heads, head_size, half,
        HAS_PASSED, BLOCK_H, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    rotate_heads(
        k_ptr, k_out_ptr, cos_ptr, sin_ptr, k_head_stride, num_kv_heads, head_size, half,
        HAS_PASSED, BLOCK_G, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    if v_ptr is not None:
        v_ptr += token * v_token_stride
        v_out_ptr += place * num_kv_heads * head_size
        copy_heads(v_ptr, v_out_ptr, v_head_stride, num_kv_heads, head_size, 0, BLOCK_G, BLOCK_D)


@triton.jit  # type: ignore[untyped-decorator]
def store_kv_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    head_size: tl.tensor,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Copy a token's keys and values to its position in the cache."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(slot_ptr + token) * num_kv_heads * head_size
    k_ptr += token * k_token_stride
    v_ptr += token * v_token_stride
    copy_heads(k_ptr, k_cache_ptr + place, k_head_stride, num_kv_heads, head_size, 0, BLOCK_G, BLOCK_D)
    copy_heads(v_ptr, v_cache_ptr + place, v_head_stride, num_kv_heads, head_size, 0, BLOCK_G, BLOCK_D)


def store_kv_meta(num_kv_heads: int, head_size: int) -> dict[str, int]:
    """Constants and launch options of `store_kv_kernel`."""
    return {
        "BLOCK_G": triton.next_power_of_2(num_kv_heads),
        "BLOCK_D": triton.next_power_of_2(head_size),
        "enable_fp_fusion": False,
    }


def rotary_meta(num_q_heads: int, num_kv_heads: int, head_size: int, rotary_dim: int) -> dict[str, int]:
    """Constants and launch options of `rotary_kernel`."""
    block_h, block_p = triton.next_power_of_2(num_q_heads), triton.next_power_of_2(rotary_dim // 2)
    return store_kv_meta(num_kv_heads, head_size) | {
        "HAS_PASSED": rotary_dim < head_size,
        "BLOCK_H": block_h,
        "BLOCK_P": block_p,
        "num_warps": 4 if block_h * block_p <= 1024 else 8,  # a thread holds several values of a pair in registers
    }


def apply_rotary(q_THd: Tensor, k_TGd: Tensor, cos_Tr: Tensor, sin_Tr: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton form of `torch_ops.apply_rotary`, same arguments and result.

    Raises:
        ValueError: operands do not fit together.
    """
    k_out_TGd = torch.empty(k_TGd.shape, dtype=k_TGd.dtype, device=k_TGd.device)
    return _launch_rotary(q_THd, k_TGd, None, cos_Tr, sin_Tr, None, k_out_TGd, None), k_out_TGd


def rotary_store_kv(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    cache_position_T: Tensor,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """The Triton form of `torch_attention.rotary_store_kv`, same arguments and result.

    Raises:
        ValueError: operands do not fit together.
    """
    if kv_scales is not None:
        q_THd, k_TGd = apply_rotary(q_THd, k_TGd, cos_Tr, sin_Tr)
        store_kv(k_TGd, v_TGd, k_cache_NBGd, v_cache_NBGd, cache_position_T, kv_scales)
        return q_THd
    check_cache(k_TGd, v_TGd, k_cache_NBGd, v_cache_NBGd, cache_position_T)
    return _launch_rotary(q_THd, k_TGd, v_TGd, cos_Tr, sin_Tr, cache_position_T, k_cache_NBGd, v_cache_NBGd)


def store_kv(
    k_TGd: Tensor,
    v_TGd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    cache_position_T: Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """The Triton form of `torch_attention.store_kv`, same arguments and effect.

    Raises:
        ValueError: operands do not fit together.
    """
    if kv_scales is not None:
        store_quantized(k_TGd, k_cache_NBGd, kv_scales.k_NBGP, cache_position_T, k_TGd.shape[2:])
        store_quantized(v_TGd, v_cache_NBGd, kv_scales.v_NBG1, cache_position_T, v_TGd.shape[2:])
        return
    check_cache(k_TGd, v_TGd, k_cache_NBGd, v_cache_NBGd, cache_position_T)
    num_tokens, num_kv_heads, head_size = k_TGd.shape
    if num_tokens:
        store_kv_kernel[(num_tokens,)](
            k_TGd,
            v_TGd,
            cache_position_T,
            k_cache_NBGd,
            v_cache_NBGd,
            *k_TGd.stride()[:2],
            *v_TGd.stride()[:2],
            num_kv_heads,
            head_size,
            **store_kv_meta(num_kv_heads, head_size),
        )


def check_cache(
    k_TGd: Tensor, v_TGd: Tensor, k_cache_NBGd: Tensor, v_cache_NBGd: Tensor, cache_position_T: Tensor
) -> None:
    """Refuse keys, values, caches and cache positions that do not fit together.

    Raises:
        ValueError: the operand and what is allowed.
    """
    check_heads(k_TGd=k_TGd, v_TGd=v_TGd)
    for name, cache in (("k_cache_NBGd", k_cache_NBGd), ("v_cache_NBGd", v_cache_NBGd)):
        if cache.shape[2:] != k_TGd.shape[1:] or cache.dtype != k_TGd.dtype or not cache.is_contiguous():
            raise ValueError(
                f"{name}: {cache.dtype} {tuple(cache.shape)} must be contiguous pages of {k_TGd.dtype} "
                f"{tuple(k_TGd.shape[1:])}"
            )
    if v_TGd.shape != k_TGd.shape or cache_position_T.shape != k_TGd.shape[:1] or cache_position_T.dtype != torch.int64:
        raise ValueError(
            f"v_TGd {tuple(v_TGd.shape)} and cache_position_T {cache_position_T.dtype} {tuple(cache_position_T.shape)} "
            f"must fit k_TGd {tuple(k_TGd.shape)}, and cache positions must be int64"
        )


def check_heads(**operands: Tensor) -> None:
    """Refuse heads whose values are not contiguous.

    Raises:
        ValueError: the operand and its strides.
    """
    for name, heads in operands.items():
        if heads.ndim != 3 or (heads.numel() and heads.stride(2) != 1):
            raise ValueError(f"{name}: strides {heads.stride()} are not allowed; there must be 3, the last of them 1")


def _launch_rotary(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor | None,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    cache_position_T: Tensor | None,
    k_out: Tensor,
    v_out: Tensor | None,
) -> Tensor:
    num_tokens, num_q_heads, head_size = q_THd.shape
    num_kv_heads, rotary_dim = k_TGd.shape[1], cos_Tr.shape[-1]
    check_heads(q_THd=q_THd, k_TGd=k_TGd)
    if not cos_Tr.is_contiguous() or not sin_Tr.is_contiguous() or cos_Tr.shape != sin_Tr.shape:
        raise ValueError(f"sin_Tr: {tuple(sin_Tr.shape)} must be {tuple(cos_Tr.shape)} as cos_Tr, both contiguous")
    q_out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
    if num_tokens:
        rotary_kernel[(num_tokens,)](
            q_THd,
            k_TGd,
            v_TGd,
            cos_Tr,
            sin_Tr,
            cache_position_T,
            q_out_THd,
            k_out,
            v_out,
            *q_THd.stride()[:2],
            *k_TGd.stride()[:2],
            *(k_TGd if v_TGd is None else v_TGd).stride()[:2],
            num_q_heads,
            num_kv_heads,
            head_size,
            rotary_dim // 2,
            **rotary_meta(num_q_heads, num_kv_heads, head_size, rotary_dim),
        )
    return q_out_THd
