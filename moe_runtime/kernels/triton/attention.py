"""Causal attention over the paged cache: prefill chunks here, decode rows in `decode_attention`.

A program has a block of (token, head) pairs of one sequence and one group, and reads the keys once. So each key read
serves all heads that share it. Softmax is in float32.

Shape suffixes: T tokens, H query heads, G key/value heads, d head size, N pages, B tokens per page, S sequences,
X chunks; in the kernels M is a block of (token, head) pairs, C of keys, D of the head's numbers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.triton.attend import attend, attention_meta, check_attention
from moe_runtime.kernels.triton.decode_attention import decode_attention
from moe_runtime.kernels.triton.tiles import Chip, chip_of


@triton.jit  # type: ignore[untyped-decorator]
def prefill_attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    context_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_sequence: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    num_groups: tl.tensor,
    heads_per_group: tl.tensor,
    head_size: tl.tensor,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A block of (token, head) pairs of one sequence and one group, over all keys that any of them sees."""
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
    token_M = tl.minimum(pair_M, num_pairs - 1) // heads_per_group
    head_M = group * heads_per_group + pair_M % heads_per_group
    d_D = tl.arange(0, BLOCK_D)
    is_q_MD = (pair_M < num_pairs)[:, None] & (d_D < head_size)[None, :]
    row_M = (start + token_M).to(tl.int64)
    q_ptr_MD = q_ptr + (row_M * q_token_stride + head_M * q_head_stride)[:, None] + d_D[None, :]
    q_MD = tl.load(q_ptr_MD, mask=is_q_MD, other=0.0)
    last_token = tl.minimum(first_pair + BLOCK_M, num_pairs) - 1
    first_key = 0
    if WINDOW > 0:
        first_seen = tl.maximum(first_query + first_pair // heads_per_group - (WINDOW - 1), 0)
        first_key = first_seen // BLOCK_C * BLOCK_C
    acc_MD, total_M, _ = attend(
        q_MD, first_query + token_M, first_key, first_query + last_token // heads_per_group + 1,
        k_ptr + group * head_size, v_ptr + group * head_size, table_ptr + sequence.to(tl.int64) * table_stride,
        num_groups * head_size, head_size, scale,
        WINDOW, PAGE, EVEN_D, BLOCK_M, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    out_ptr_MD = out_ptr + ((row_M * num_groups * heads_per_group + head_M) * head_size)[:, None] + d_D[None, :]
    tl.store(out_ptr_MD, (acc_MD / total_M[:, None]).to(out_ptr.dtype.element_ty), mask=is_q_MD)


def prefill_attention_meta(
    head_size: int, page_size: int, sliding_window: int | None, itemsize: int, chip: Chip
) -> dict[str, int]:
    """Constants and launch options of `prefill_attention_kernel`."""
    rows = 16 if itemsize == 4 else 128 if head_size <= 128 else 64
    keys = 64 if chip.has_new_mma else 32  # mma.sync takes its operands from registers
    return attention_meta(head_size, page_size, sliding_window, itemsize, rows=rows, keys=keys)


def paged_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """The Triton form of `torch_attention.paged_attention`, same arguments and result.

    Raises:
        ValueError: operands do not fit together.
    """
    num_groups = check_attention(q_THd, k_cache_NBGd, v_cache_NBGd)
    num_tokens, num_heads, head_size = q_THd.shape
    assert num_tokens == meta.num_tokens, (q_THd.shape, meta.num_tokens)
    out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
    on_device = meta.on_device
    if meta.num_decode:
        decode = slice(0, meta.num_decode)
        decode_attention(
            q_THd[decode],
            k_cache_NBGd,
            v_cache_NBGd,
            meta.page_table,
            on_device.sequence_T[decode],
            on_device.position_T[decode],
            max_context=max(meta.context_len[decode]),
            scale=scale,
            sliding_window=sliding_window,
            out_THd=out_THd[decode],
        )
    if num_chunks := len(meta.context_len) - meta.num_decode:
        options = prefill_attention_meta(
            head_size, k_cache_NBGd.shape[1], sliding_window, q_THd.element_size(), chip_of(q_THd.device)
        )
        heads_per_group = num_heads // num_groups
        most_pairs = max(meta.num_query[meta.num_decode :]) * heads_per_group
        prefill_attention_kernel[(triton.cdiv(most_pairs, options["BLOCK_M"]), num_groups, num_chunks)](
            q_THd,
            k_cache_NBGd,
            v_cache_NBGd,
            meta.page_table,
            on_device.query_start,
            on_device.context_len,
            out_THd,
            meta.num_decode,
            *q_THd.stride()[:2],
            meta.page_table.stride(0),
            num_groups,
            heads_per_group,
            head_size,
            scale * math.log2(math.e),
            **options,
        )
    return out_THd


def invariant_paged_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """`paged_attention` with decode attention for every row: the same bits for any cut of a prompt into chunks.

    Raises:
        ValueError: operands do not fit together.
    """
    return decode_attention(
        q_THd,
        k_cache_NBGd,
        v_cache_NBGd,
        meta.page_table,
        meta.on_device.sequence_T,
        meta.on_device.position_T,
        max_context=meta.max_context,
        scale=scale,
        sliding_window=sliding_window,
    )
