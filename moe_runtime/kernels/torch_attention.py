"""Attention over the paged KV cache in torch, and the write into it.

Shape suffixes: T tokens, H query heads, G key/value heads, d head size, N pages, B tokens per page,
S sequences read together, Q query rows of each, C gathered keys, R query heads per key/value head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.torch_ops import apply_rotary


def store_kv(
    k_TGd: Tensor, v_TGd: Tensor, k_cache_NBGd: Tensor, v_cache_NBGd: Tensor, cache_position_T: Tensor
) -> None:
    """Write each token's key and value to its position in the cache, in place.

    Args:
        cache_position_T: int64, `page * block_size + offset`, all different.
    """
    k_cache_NBGd.flatten(0, 1).index_copy_(0, cache_position_T, k_TGd)
    v_cache_NBGd.flatten(0, 1).index_copy_(0, cache_position_T, v_TGd)


def rotary_store_kv(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    cache_position_T: Tensor,
) -> Tensor:
    """`apply_rotary`, then `store_kv` of the rotated keys; returns the rotated queries."""
    q_THd, k_TGd = apply_rotary(q_THd, k_TGd, cos_Tr, sin_Tr)
    store_kv(k_TGd, v_TGd, k_cache_NBGd, v_cache_NBGd, cache_position_T)
    return q_THd


def paged_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of a step's queries over the cached keys of their own sequence.

    Softmax is in float32. The step's own keys must already be in the cache. The whole cache must be finite (allocate it
    with zeros), because keys that a query may not see get weight 0, and 0 times NaN is NaN.

    Returns:
        `[T, H, d]` in the dtype of `q_THd`.
    """
    assert q_THd.shape[0] == meta.num_tokens, (q_THd.shape, meta.num_tokens)
    out_THd = q_THd.new_empty(q_THd.shape)
    for read in meta.reads(k_cache_NBGd.shape[1], sliding_window):
        k_SGCd = k_cache_NBGd[read.pages].flatten(1, 2)[:, : read.num_keys].transpose(1, 2)
        v_SGCd = v_cache_NBGd[read.pages].flatten(1, 2)[:, : read.num_keys].transpose(1, 2)
        q_SQHd = q_THd[read.rows].reshape(len(read.pages), -1, *q_THd.shape[1:])
        attend = _attend_one if q_SQHd.shape[1] == 1 else _attend_many
        out_THd[read.rows] = attend(q_SQHd, k_SGCd, v_SGCd, read.visible, scale).flatten(0, 1)
    return out_THd


def decode_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    page_table: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    *,
    max_context: int,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Attention of rows of any sequence and position; all values that depend on the step are on the device.

    Args:
        page_table: int64 `[S, max_pages]`, pages of each sequence.
        sequence_T: int32 or int64, which row of the page table each token uses.
        position_T: int32 or int64; a row sees the keys up to its own position.
        max_context: at least the largest position plus one; this many keys are gathered for each row.

    Returns:
        `[T, H, d]` in the dtype of `q_THd`.
    """
    num_pages = -(-max_context // k_cache_NBGd.shape[1])
    block_TM = page_table[sequence_T.long(), :num_pages]
    k_TGCd = k_cache_NBGd[block_TM].flatten(1, 2).transpose(1, 2)
    v_TGCd = v_cache_NBGd[block_TM].flatten(1, 2).transpose(1, 2)
    key_C = torch.arange(k_TGCd.shape[2], device=q_THd.device)
    visible_TC = key_C <= position_T[:, None]
    if sliding_window is not None:
        visible_TC &= key_C > position_T[:, None] - sliding_window
    return _attend_one(q_THd[:, None], k_TGCd, v_TGCd, visible_TC[:, None], scale)[:, 0]


def _attend_one(q_S1Hd: Tensor, k_SGCd: Tensor, v_SGCd: Tensor, visible_S1C: Tensor | None, scale: float) -> Tensor:
    """One query row per sequence: the heads of a group become query rows, so that no key is repeated."""
    (num_seqs, _, _, head_size), num_groups = q_S1Hd.shape, k_SGCd.shape[1]
    q_SGRd = q_S1Hd.reshape(num_seqs, num_groups, -1, head_size)
    visible_S11C = None if visible_S1C is None else visible_S1C[:, None]
    out_SGRd = F.scaled_dot_product_attention(q_SGRd, k_SGCd, v_SGCd, attn_mask=visible_S11C, scale=scale)
    return out_SGRd.flatten(1, 2).unsqueeze(1)


def _attend_many(q_SQHd: Tensor, k_SGCd: Tensor, v_SGCd: Tensor, visible_SQC: Tensor | None, scale: float) -> Tensor:
    out_SHQd = F.scaled_dot_product_attention(
        q_SQHd.transpose(1, 2),
        k_SGCd,
        v_SGCd,
        attn_mask=None if visible_SQC is None else visible_SQC[:, None],
        is_causal=visible_SQC is None,
        scale=scale,
        enable_gqa=q_SQHd.shape[2] != k_SGCd.shape[1],
    )
    return out_SHQd.transpose(1, 2)
