"""Slow references: one row at a time, written to be read. Tests compare the fast forms with them.

Each has the signature of its fast form in `moe_runtime.kernels.ops`. Sums are in float64, results in the dtype of the
fast form. Shape suffixes are those of `torch_ops` and `torch_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_runtime.kernels.attention import AttentionMetadata
from moe_runtime.kernels.kv_rows import KVScales, key_parts, widen_rows
from moe_runtime.kernels.quantized_slots import MatrixSlots, dense
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU
from moe_runtime.kernels.torch_ops import Scoring


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
    """Attention one query and one head at a time, its keys looked up one by one."""
    if kv_scales is not None:
        parts = key_parts(k_cache_NBGd.shape[3], v_cache_NBGe.shape[3], kv_scales.k_NBGP)
        k_cache_NBGd = widen_rows(k_cache_NBGd, kv_scales.k_NBGP, parts, q_THd.dtype)
        v_cache_NBGe = widen_rows(v_cache_NBGe, kv_scales.v_NBG1, v_cache_NBGe.shape[3:], q_THd.dtype)
    block_size, num_groups = k_cache_NBGd.shape[1:3]
    heads_per_group = q_THd.shape[1] // num_groups
    out_THe = q_THd.new_zeros(*q_THd.shape[:2], v_cache_NBGe.shape[3])
    for sequence, context in enumerate(meta.context_len):
        start, end = meta.query_start[sequence : sequence + 2]
        for row in range(start, end):
            position = context - (end - row)
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            places = [
                (int(meta.page_table[sequence, key // block_size]), key % block_size)
                for key in range(first, position + 1)
            ]
            k_CGd = torch.stack([k_cache_NBGd[place] for place in places]).double()
            v_CGe = torch.stack([v_cache_NBGe[place] for place in places]).double()
            for head in range(q_THd.shape[1]):
                group = head // heads_per_group
                score_C = k_CGd[:, group] @ q_THd[row, head].double() * scale
                if sinks_H is None:
                    weights_C = score_C.softmax(0)
                else:  # as one key more, which has no value
                    weights_C = torch.cat((score_C, sinks_H[head].double()[None])).softmax(0)[:-1]
                out_THe[row, head] = (weights_C @ v_CGe[:, group]).to(q_THd.dtype)
    return out_THe


def topk_gate(
    logits_TE: Tensor,
    *,
    top_k: int,
    scoring: Scoring,
    correction_bias_E: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    groups_by_best: bool = False,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The gate one token at a time. Scores and choices equal the fast form's bit for bit, since rounding makes ties."""
    num_tokens, num_experts = logits_TE.shape
    group_size = num_experts // num_groups
    weights_TK = torch.empty(num_tokens, top_k)
    experts_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    for token, scores_E in enumerate(scores_TE):
        choice_E = scores_E if correction_bias_E is None else scores_E + correction_bias_E
        choice = choice_E.tolist()
        allowed = list(range(num_experts))
        if num_groups > 1:
            group_scores = []
            for group in range(num_groups):
                best_first = sorted(choice_E[group * group_size : (group + 1) * group_size], reverse=True)
                group_scores.append(float(best_first[0] if groups_by_best else best_first[0] + best_first[1]))
            groups = sorted(range(num_groups), key=lambda g: (-group_scores[g], g))[:topk_groups]
            allowed = [expert for expert in allowed if expert // group_size in groups]
        experts = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
        weights = [float(scores_E[expert]) for expert in experts]
        if normalize:
            total = sum(weights) + 1e-20
            weights = [weight / total for weight in weights]
        weights_TK[token] = torch.tensor([weight * scale for weight in weights])
        experts_TK[token] = torch.tensor(experts)
    return weights_TK, experts_TK


def grouped_mlp(
    x_ND: Tensor,
    row_R: Tensor | None,
    counts_S: Tensor,
    w13_SGD: MatrixSlots,
    w2_SDF: MatrixSlots,
    *,
    b13_SG: Tensor | None = None,
    b2_SD: Tensor | None = None,
    swiglu: SwiGLU = PLAIN,
) -> Tensor:
    """The expert MLP one row at a time; the product is rounded between the two projections, as in the fast forms."""
    slots = torch.repeat_interleave(torch.arange(len(counts_S)), counts_S.cpu())
    rows = torch.arange(len(x_ND)) if row_R is None else row_R
    intermediate = w2_SDF.shape[2]
    out_RD = x_ND.new_empty(len(rows), x_ND.shape[1])
    for place, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
        gate_up = dense(w13_SGD[slot], x_ND.dtype).double() @ x_ND[row].double()
        if b13_SG is not None:
            gate_up += b13_SG[slot].double()
        gate, up = gate_up[:intermediate], gate_up[intermediate:]
        gate, up = gate.clamp(max=swiglu.limit), up.clamp(-swiglu.limit, swiglu.limit)
        product = (gate / (1 + torch.exp(-swiglu.alpha * gate)) * (up + swiglu.offset)).to(x_ND.dtype)
        out_D = dense(w2_SDF[slot], x_ND.dtype).double() @ product.double()
        if b2_SD is not None:
            out_D += b2_SD[slot].double()
        out_RD[place] = out_D.to(x_ND.dtype)
    return out_RD


def combine_topk(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum one token at a time: products and sums in float32, in order of `k`."""
    out_TD = torch.empty_like(y_TKD[:, 0])
    for token in range(len(y_TKD)):
        total_D = torch.zeros(y_TKD.shape[2], dtype=torch.float32, device=y_TKD.device)
        for y_D, weight in zip(y_TKD[token], weights_TK[token], strict=True):
            total_D = total_D + y_D.float() * weight.float()
        out_TD[token] = total_D.to(y_TKD.dtype)
    return out_TD
