"""Causal attention over the paged cache: prefill chunks here, decode rows in `decode_attention`.

A program has a block of (token, head) pairs of one sequence and one group, and reads the keys once. So each key read
serves all heads that share it. Softmax is in float32.

Shape suffixes: as in `attend`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.kv_rows import KVScales
from moe_runtime.kernels.triton.attend import (
    HeadSizes,
    attend,
    attention_meta,
    cache_arguments,
    check_operands,
    load_part,
    sink_weight,
)
from moe_runtime.kernels.triton.decode_attention import decode_attention
from moe_runtime.kernels.triton.tiles import Chip, chip_of


@triton.jit  # type: ignore[untyped-decorator]
def prefill_attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    context_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_sequence: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    k_page_stride: tl.tensor,
    v_page_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    num_groups: tl.tensor,
    heads_per_group: tl.tensor,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
    REUSE_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """A block of (token, head) pairs of one sequence and one group, over all keys that any of them sees. Without sinks,
    `sinks_ptr` is `None`."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # blocks with the most keys begin first
    group = tl.program_id(1)
    sequence = first_sequence + tl.program_id(2)
    start = tl.load(query_start_ptr + sequence)
    num_query = tl.load(query_start_ptr + sequence + 1) - start
    first_query = tl.load(context_ptr + sequence) - num_query  # position of the chunk's first token
    first_pair = block * BLOCK_M
    num_pairs = num_query * heads_per_group
    if first_pair >= num_pairs:
        return

    pair_M = first_pair + tl.arange(0, BLOCK_M)
    is_pair_M = pair_M < num_pairs
    token_M = tl.minimum(pair_M, num_pairs - 1) // heads_per_group
    head_M = group * heads_per_group + pair_M % heads_per_group
    row_M = (start + token_M).to(tl.int64)
    q_place_M = row_M * q_token_stride + head_M * q_head_stride
    q_MD = load_part(q_ptr, q_place_M, is_pair_M, 0, HEAD_SIZE, BLOCK_D)
    q_MR = q_MD
    if BLOCK_R > 0:
        q_MR = load_part(q_ptr, q_place_M, is_pair_M, BLOCK_D, HEAD_SIZE, BLOCK_R)
    last_token = tl.minimum(first_pair + BLOCK_M, num_pairs) - 1
    first_key = 0
    if WINDOW > 0:
        first_seen = tl.maximum(first_query + first_pair // heads_per_group - (WINDOW - 1), 0)
        first_key = first_seen // BLOCK_C * BLOCK_C
    if SCALES > 0:  # otherwise pointers to scales are None
        k_scale_ptr += group * SCALES
        v_scale_ptr += group * SCALES
    acc_ME, total_M, max_M = attend(
        q_MD, q_MR, first_query + token_M, first_key, first_query + last_token // heads_per_group + 1,
        k_ptr + group * HEAD_SIZE, v_ptr + group * VALUE_STRIDE, k_scale_ptr, v_scale_ptr,
        table_ptr + sequence.to(tl.int64) * table_stride, k_page_stride, v_page_stride, scale_page_stride,
        num_groups, scale,
        WINDOW, PAGE, HEAD_SIZE, VALUE_SIZE, VALUE_STRIDE, SCALES, REUSE_KEYS,
        BLOCK_M, BLOCK_C, BLOCK_D, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    if sinks_ptr is not None:
        total_M += sink_weight(tl.load(sinks_ptr + head_M), max_M)
    e_E = tl.arange(0, BLOCK_E)
    is_out_ME = is_pair_M[:, None] & (e_E < VALUE_SIZE)[None, :]
    out_ptr_ME = out_ptr + ((row_M * num_groups * heads_per_group + head_M) * VALUE_SIZE)[:, None] + e_E[None, :]
    tl.store(out_ptr_ME, (acc_ME / total_M[:, None]).to(out_ptr.dtype.element_ty), mask=is_out_ME)


def prefill_attention_meta(
    sizes: HeadSizes, page_size: int, sliding_window: int | None, itemsize: int, chip: Chip
) -> dict[str, int]:
    """Constants and launch options of `prefill_attention_kernel`."""
    # mma.sync takes its operands from registers, which hold the sums as well, and keys that are widened.
    narrow = (sizes.widest if chip.has_new_mma else sizes.most) <= 128
    rows = 128 if narrow else 64 if sizes.widest <= 256 else 32
    if sizes.scales and not chip.has_new_mma:
        rows //= 2
    if itemsize == 4 or sizes.has_large_widened_keys:
        rows = 16
    keys = 64 if chip.has_new_mma else 32
    return attention_meta(sizes, page_size, sliding_window, itemsize, chip, rows=rows, keys=keys)


def paged_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """The Triton form of `torch_attention.paged_attention`, same arguments and result.

    Sinks and the pages of caches are contiguous, or values are `k_cache_NBGd[..., :e]`.

    Raises:
        ValueError: operands do not fit together.
    """
    num_groups, sizes = check_operands(q_THd, k_cache_NBGd, v_cache_NBGe, sinks_H, kv_scales)
    num_tokens, num_heads, _ = q_THd.shape
    assert num_tokens == meta.num_tokens, (q_THd.shape, meta.num_tokens)
    out_THe = torch.empty(num_tokens, num_heads, sizes.value, dtype=q_THd.dtype, device=q_THd.device)
    on_device = meta.on_device
    if meta.num_decode:
        decode = slice(0, meta.num_decode)
        decode_attention(
            q_THd[decode],
            k_cache_NBGd,
            v_cache_NBGe,
            meta.page_table,
            on_device.sequence_T[decode],
            on_device.position_T[decode],
            max_context=max(meta.context_len[decode]),
            scale=scale,
            sliding_window=sliding_window,
            sinks_H=sinks_H,
            kv_scales=kv_scales,
            out_THe=out_THe[decode],
        )
    if num_chunks := len(meta.context_len) - meta.num_decode:
        options = prefill_attention_meta(
            sizes, k_cache_NBGd.shape[1], sliding_window, q_THd.element_size(), chip_of(q_THd.device)
        )
        heads_per_group = num_heads // num_groups
        most_pairs = max(meta.num_query[meta.num_decode :]) * heads_per_group
        pointers, strides = cache_arguments(k_cache_NBGd, v_cache_NBGe, kv_scales, meta.page_table)
        prefill_attention_kernel[(triton.cdiv(most_pairs, options["BLOCK_M"]), num_groups, num_chunks)](
            q_THd,
            *pointers,
            on_device.query_start,
            on_device.context_len,
            sinks_H,
            out_THe,
            meta.num_decode,
            *q_THd.stride()[:2],
            meta.page_table.stride(0),
            *strides,
            num_groups,
            heads_per_group,
            scale * math.log2(math.e),
            **options,
        )
    return out_THe


def invariant_paged_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """`paged_attention` with decode attention for every row: the same bits for any cut of a prompt into chunks.

    Raises:
        ValueError: operands do not fit together.
    """
    return decode_attention(
        q_THd,
        k_cache_NBGd,
        v_cache_NBGe,
        meta.page_table,
        meta.on_device.sequence_T,
        meta.on_device.position_T,
        max_context=meta.max_context,
        scale=scale,
        sliding_window=sliding_window,
        sinks_H=sinks_H,
        kv_scales=kv_scales,
    )
