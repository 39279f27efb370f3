"""Attention over the paged KV cache in torch, and the write into it.

Shape suffixes: T tokens, H query heads, G key/value heads, d head size of keys, e of values, N pages, B tokens per
page, S sequences read together, Q query rows of each, C gathered keys, R query heads per key/value head, M = R * Q, P
scales of a row of 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.kv_rows import KVScales, is_quantized, key_parts, store_quantized, take_pages
from moe_runtime.kernels.torch_ops import apply_rotary


def store_kv(
    k_TGd: Tensor,
    v_TGd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGd: Tensor,
    cache_position_T: Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """Write each token's key and value to its position in the cache, in place.

    Args:
        cache_position_T: int64, `page * block_size + offset`, all different.
        kv_scales: of a cache whose rows have 8 bits (`kv_rows`).
    """
    if kv_scales is not None:
        store_quantized(k_TGd, k_cache_NBGd, kv_scales.k_NBGP, cache_position_T, k_TGd.shape[2:])
        store_quantized(v_TGd, v_cache_NBGd, kv_scales.v_NBG1, cache_position_T, v_TGd.shape[2:])
        return
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
    kv_scales: KVScales | None = None,
) -> Tensor:
    """`apply_rotary`, then `store_kv` of the rotated keys; returns the rotated queries."""
    q_THd, k_TGd = apply_rotary(q_THd, k_TGd, cos_Tr, sin_Tr)
    store_kv(k_TGd, v_TGd, k_cache_NBGd, v_cache_NBGd, cache_position_T, kv_scales)
    return q_THd


def check_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    sinks_H: Tensor | None,
    kv_scales: KVScales | None = None,
) -> None:
    """Refuse operands of attention that do not fit together.

    Raises:
        ValueError: the operand, its shape or dtype and what is allowed.
    """
    num_groups, head_size = k_cache_NBGd.shape[2:]
    if q_THd.shape[2] != head_size or q_THd.shape[1] % num_groups:
        raise ValueError(f"q_THd: shape {tuple(q_THd.shape)} does not fit k_cache_NBGd {tuple(k_cache_NBGd.shape)}")
    if v_cache_NBGe.shape[:3] != k_cache_NBGd.shape[:3]:
        raise ValueError(
            f"v_cache_NBGe: shape {tuple(v_cache_NBGe.shape)} does not fit k_cache_NBGd {tuple(k_cache_NBGd.shape)}; "
            "only the last number may differ"
        )
    if kv_scales is not None:
        _check_quantized(k_cache_NBGd, v_cache_NBGe, kv_scales)
    for name, cache in (("k_cache_NBGd", k_cache_NBGd), ("v_cache_NBGe", v_cache_NBGe)):
        if kv_scales is None and cache.dtype != q_THd.dtype:
            raise ValueError(f"{name}: {cache.dtype} is not allowed; it must be {q_THd.dtype} as q_THd")
    if sinks_H is not None and (sinks_H.shape != q_THd.shape[1:2] or sinks_H.dtype != torch.float32):
        raise ValueError(
            f"sinks_H: {sinks_H.dtype} {tuple(sinks_H.shape)} must be float32 of {q_THd.shape[1]} query heads"
        )


def _check_quantized(k_cache_NBGd: Tensor, v_cache_NBGe: Tensor, kv_scales: KVScales) -> None:
    dtypes = k_cache_NBGd.dtype, v_cache_NBGe.dtype
    if not is_quantized(k_cache_NBGd) or dtypes[0] != dtypes[1]:
        raise ValueError(f"kv_scales: caches of {dtypes} are not allowed; both must be int8, or both float8_e4m3fn")
    for name, scale, most in (("k_NBGP", kv_scales.k_NBGP, 2), ("v_NBG1", kv_scales.v_NBG1, 1)):
        if scale.shape[:3] != k_cache_NBGd.shape[:3] or not 1 <= scale.shape[3] <= most or scale.dtype != torch.float32:
            raise ValueError(
                f"kv_scales: {name} {scale.dtype} {tuple(scale.shape)} is not allowed; it must be float32 "
                f"{(*k_cache_NBGd.shape[:3], 'at most ' + str(most))}"
            )


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
    """Causal attention of a step's queries over the cached keys of their own sequence.

    Softmax is in float32. The step's own keys must already be in the cache. The whole cache must be finite (allocate it
    with zeros), because keys that a query may not see get weight 0, and 0 times NaN is NaN.

    Args:
        v_cache_NBGe: may be `k_cache_NBGd[..., :e]`: with latent attention (DeepSeek-V2, arXiv:2405.04434, section
            2.1), the values are the first numbers of the keys.
        sinks_H: float32, one score per head, which is not scaled. It takes part in the softmax like the score of one
            key more, which every query sees and which has no value (gpt-oss).
        kv_scales: of a cache whose rows have 8 bits; they are widened to the dtype of `q_THd` (`kv_rows`).

    Returns:
        `[T, H, e]` in the dtype of `q_THd`.

    Raises:
        ValueError: operands do not fit together.
    """
    check_attention(q_THd, k_cache_NBGd, v_cache_NBGe, sinks_H, kv_scales)
    assert q_THd.shape[0] == meta.num_tokens, (q_THd.shape, meta.num_tokens)
    out_THe = q_THd.new_empty(*q_THd.shape[:2], v_cache_NBGe.shape[3])
    for read in meta.reads(k_cache_NBGd.shape[1], sliding_window):
        k_SGCd, v_SGCe = _gather(read.pages, read.num_keys, k_cache_NBGd, v_cache_NBGe, kv_scales, q_THd.dtype)
        q_SQHd = q_THd[read.rows].reshape(len(read.pages), -1, *q_THd.shape[1:])
        out_THe[read.rows] = _attend(q_SQHd, k_SGCd, v_SGCe, read.visible, scale, sinks_H).flatten(0, 1)
    return out_THe


def decode_attention(
    q_THd: Tensor,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    page_table: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    *,
    max_context: int,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """Attention of rows of any sequence and position; all values that depend on the step are on the device.

    Args:
        v_cache_NBGe, sinks_H, kv_scales: as in `paged_attention`.
        page_table: int64 `[S, max_pages]`, pages of each sequence.
        sequence_T: int32 or int64, which row of the page table each token uses.
        position_T: int32 or int64; a row sees the keys up to its own position.
        max_context: at least the largest position plus one; this many keys are gathered for each row.

    Returns:
        `[T, H, e]` in the dtype of `q_THd`.

    Raises:
        ValueError: operands do not fit together.
    """
    check_attention(q_THd, k_cache_NBGd, v_cache_NBGe, sinks_H, kv_scales)
    num_pages = -(-max_context // k_cache_NBGd.shape[1])
    block_TM = page_table[sequence_T.long(), :num_pages]
    k_TGCd, v_TGCe = _gather(block_TM, None, k_cache_NBGd, v_cache_NBGe, kv_scales, q_THd.dtype)
    key_C = torch.arange(k_TGCd.shape[2], device=q_THd.device)
    visible_TC = key_C <= position_T[:, None]
    if sliding_window is not None:
        visible_TC &= key_C > position_T[:, None] - sliding_window
    return _attend(q_THd[:, None], k_TGCd, v_TGCe, visible_TC[:, None], scale, sinks_H)[:, 0]


def _gather(
    pages_SM: Tensor,
    num_keys: int | None,
    k_cache_NBGd: Tensor,
    v_cache_NBGe: Tensor,
    kv_scales: KVScales | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys `[S, G, C, d]` and values `[S, G, C, e]` of pages, from the front; all with `num_keys` None."""
    k_scale, v_scale = (None, None) if kv_scales is None else (kv_scales.k_NBGP, kv_scales.v_NBG1)
    key_size, value_size = k_cache_NBGd.shape[3], v_cache_NBGe.shape[3]
    parts = () if k_scale is None else key_parts(key_size, value_size, k_scale)
    k_SMBGd = take_pages(k_cache_NBGd, k_scale, pages_SM, parts, dtype)
    v_SMBGe = take_pages(v_cache_NBGe, v_scale, pages_SM, (value_size,), dtype)
    k_SGCd, v_SGCe = (rows.flatten(1, 2)[:, :num_keys].transpose(1, 2) for rows in (k_SMBGd, v_SMBGe))
    return k_SGCd, v_SGCe


def _attend(
    q_SQHd: Tensor,
    k_SGCd: Tensor,
    v_SGCe: Tensor,
    visible_SQC: Tensor | None,
    scale: float,
    sinks_H: Tensor | None,
) -> Tensor:
    if sinks_H is not None:
        return _attend_with_sinks(q_SQHd, k_SGCd, v_SGCe, visible_SQC, scale, sinks_H)
    attend = _attend_one if q_SQHd.shape[1] == 1 else _attend_many
    return attend(q_SQHd, k_SGCd, v_SGCe, visible_SQC, scale)


def _attend_one(q_S1Hd: Tensor, k_SGCd: Tensor, v_SGCe: Tensor, visible_S1C: Tensor | None, scale: float) -> Tensor:
    """One query row per sequence: the heads of a group become query rows, so that no key is repeated."""
    (num_seqs, _, _, head_size), num_groups = q_S1Hd.shape, k_SGCd.shape[1]
    q_SGRd = q_S1Hd.reshape(num_seqs, num_groups, -1, head_size)
    visible_S11C = None if visible_S1C is None else visible_S1C[:, None]
    out_SGRe = F.scaled_dot_product_attention(q_SGRd, k_SGCd, v_SGCe, attn_mask=visible_S11C, scale=scale)
    return out_SGRe.flatten(1, 2).unsqueeze(1)


def _attend_many(q_SQHd: Tensor, k_SGCd: Tensor, v_SGCe: Tensor, visible_SQC: Tensor | None, scale: float) -> Tensor:
    out_SHQe = F.scaled_dot_product_attention(
        q_SQHd.transpose(1, 2),
        k_SGCd,
        v_SGCe,
        attn_mask=None if visible_SQC is None else visible_SQC[:, None],
        is_causal=visible_SQC is None,
        scale=scale,
        enable_gqa=q_SQHd.shape[2] != k_SGCd.shape[1],
    )
    return out_SHQe.transpose(1, 2)


def _attend_with_sinks(
    q_SQHd: Tensor, k_SGCd: Tensor, v_SGCe: Tensor, visible_SQC: Tensor | None, scale: float, sinks_H: Tensor
) -> Tensor:
    """All in float32; `F.scaled_dot_product_attention` has no sinks."""
    (num_seqs, num_rows, num_heads, head_size), num_groups = q_SQHd.shape, k_SGCd.shape[1]
    heads = (num_groups, num_heads // num_groups)
    q_SGMd = q_SQHd.float().transpose(1, 2).reshape(num_seqs, num_groups, heads[1] * num_rows, head_size)
    score_SGRQC = (q_SGMd @ k_SGCd.float().mT * scale).unflatten(2, (heads[1], num_rows))
    if visible_SQC is None:
        visible_SQC = torch.ones(1, *score_SGRQC.shape[3:], dtype=torch.bool, device=q_SQHd.device).tril()
    score_SGRQC.masked_fill_(~visible_SQC[:, None, None], float("-inf"))
    sink_SGRQ1 = sinks_H.view(*heads, 1, 1).expand(num_seqs, *heads, num_rows, 1)
    weights_SGRQC = torch.cat((score_SGRQC, sink_SGRQ1), -1).softmax(-1)[..., :-1]
    out_SGMe = weights_SGRQC.flatten(2, 3) @ v_SGCe.float()
    out_SHQe = out_SGMe.reshape(num_seqs, num_heads, num_rows, v_SGCe.shape[3])
    return out_SHQe.transpose(1, 2).to(q_SQHd.dtype)
