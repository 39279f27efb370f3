"""Shared by both attention kernels: the loop over a sequence's keys, its constants, and the checks of operands.

Shape suffixes: T tokens, H query heads, G key/value heads, d head size, N pages, B tokens per page, S sequences,
X chunks; in the kernels M is a block of (token, head) pairs, C of keys, D of the head's numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.kernels.triton.rotary import check_heads


@triton.jit  # type: ignore[untyped-decorator]
def attend(
    q_MD: tl.tensor,
    position_M: tl.tensor,
    first_key: tl.tensor,
    end_key: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    key_stride: tl.tensor,
    head_size: tl.tensor,
    scale: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weighted sum of values, sum of weights and largest score (base 2) of each row, over keys `first .. end`."""
    d_D = tl.arange(0, BLOCK_D)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    total_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    max_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    for start in range(first_key, end_key, BLOCK_C):
        key_C = start + tl.arange(0, BLOCK_C)
        is_key_C = key_C < end_key
        page_C = tl.load(table_ptr + key_C // PAGE, mask=is_key_C, other=0)
        place_C = (page_C * PAGE + key_C % PAGE) * key_stride
        # After the last key, values belong to no sequence. They are read as zeros, because 0 times NaN is NaN.
        is_k_CD = is_key_C[:, None] if EVEN_D else is_key_C[:, None] & (d_D < head_size)[None, :]
        k_CD = tl.load(k_ptr + place_C[:, None] + d_D[None, :], mask=is_k_CD, other=0.0)
        score_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision="ieee") * scale
        visible_MC = (key_C[None, :] <= position_M[:, None]) & is_key_C[None, :]
        if WINDOW > 0:
            visible_MC &= key_C[None, :] > position_M[:, None] - WINDOW
        score_MC = tl.where(visible_MC, score_MC, float("-inf"))

        new_max_M = tl.maximum(max_M, tl.max(score_MC, 1))
        finite_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)  # a row may see none of these keys
        weight_MC = tl.exp2(score_MC - finite_M[:, None])
        shrink_M = tl.exp2(max_M - finite_M)
        total_M = total_M * shrink_M + tl.sum(weight_MC, 1)
        v_CD = tl.load(v_ptr + place_C[:, None] + d_D[None, :], mask=is_k_CD, other=0.0)
        acc_MD = tl.dot(weight_MC.to(v_CD.dtype), v_CD, acc_MD * shrink_M[:, None], input_precision="ieee")
        max_M = new_max_M
    return acc_MD, total_M, max_M


def attention_meta(
    head_size: int, page_size: int, sliding_window: int | None, itemsize: int, *, rows: int, keys: int
) -> dict[str, int]:
    """Constants and launch options that both attention kernels share; `rows` (token, head) pairs and `keys` a step."""
    block_d = max(16, triton.next_power_of_2(head_size))
    large = rows * block_d > 64 * 128 or itemsize == 4  # float32 is multiplied in registers
    return {
        "WINDOW": sliding_window or 0,
        "PAGE": page_size,
        "EVEN_D": head_size == block_d,
        "BLOCK_M": rows,
        "BLOCK_C": 16 if itemsize == 4 else 32 if block_d > 128 else keys,
        "BLOCK_D": block_d,
        "num_warps": 8 if large else 4,
        "num_stages": 3 if rows > 64 or itemsize == 4 else 2,
        "enable_fp_fusion": True,
    }


def check_attention(q_THd: Tensor, k_cache_NBGd: Tensor, v_cache_NBGd: Tensor) -> int:
    """Refuse operands that do not fit together; returns the number of key/value heads.

    Raises:
        ValueError: the operand and what is allowed.
    """
    check_heads(q_THd=q_THd)
    num_groups, head_size = k_cache_NBGd.shape[2:]
    for name, cache in (("k_cache_NBGd", k_cache_NBGd), ("v_cache_NBGd", v_cache_NBGd)):
        if cache.shape != k_cache_NBGd.shape or cache.dtype != q_THd.dtype or not cache.is_contiguous():
            raise ValueError(f"{name}: {cache.dtype} {tuple(cache.shape)} must be contiguous pages of {q_THd.dtype}")
    if q_THd.shape[2] != head_size or q_THd.shape[1] % num_groups:
        raise ValueError(f"q_THd: shape {tuple(q_THd.shape)} does not fit caches {tuple(k_cache_NBGd.shape)}")
    return num_groups
