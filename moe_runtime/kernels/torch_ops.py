"""Torch twins of the kernels: the meaning of each op, on any device.

Shape suffixes: T tokens, D hidden, F expert intermediate, E logical experts, S local slots, K experts per token,
N input rows, R received rows, H query heads, G key/value heads, d head size, r rotated dimensions; in experts, G is 2F
(gate outputs, then up outputs).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_runtime.kernels.quantized_slots import MatrixSlots, dense
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU

Scoring = Literal["softmax", "sigmoid"]


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension (arXiv:1910.07467), rounded as transformers rounds it.

    The norm is taken in float32, rounded to the dtype of `x_TD` and then multiplied by the weight.

    Args:
        x_TD: `[..., D]`.
    """
    x_f32 = x_TD.float()
    scale = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
    return weight_D * (x_f32 * scale).to(x_TD.dtype)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`residual + multiplier * x`, and its norm: returns `(normed, new residual)`, the sum rounded before the norm."""
    residual_TD = torch.add(residual_TD, x_TD, alpha=multiplier)
    return rms_norm(residual_TD, weight_D, eps), residual_TD


def apply_rotary(q_THd: Tensor, k_TGd: Tensor, cos_Tr: Tensor, sin_Tr: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv:2104.09864) of the first `r` dimensions of each head; the rest is unchanged.

    Dimension `i` rotates with `i + r/2` (the NeoX pairing). Products and sums are in float32 and rounded once.

    Args:
        cos_Tr, sin_Tr: float32, both halves of `r` filled.
    """
    cos_T1r, sin_T1r = cos_Tr[:, None], sin_Tr[:, None]
    return _rotate(q_THd, cos_T1r, sin_T1r), _rotate(k_TGd, cos_T1r, sin_T1r)


def _rotate(x_THd: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    r = cos_T1r.shape[-1]
    turned, passed = x_THd[..., :r].float(), x_THd[..., r:]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos_T1r + torch.cat((-second, first), dim=-1) * sin_T1r).to(x_THd.dtype)
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """`silu(gate) * up` of the first and second half of the last dimension (SwiGLU, arXiv:2002.05202)."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def swiglu_mul(gate_up_T2F: Tensor, swiglu: SwiGLU) -> Tensor:
    """`swiglu` of the first (gate) and second half of the last dimension, in float32, rounded once."""
    gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=-1)
    gate_TF = gate_TF.clamp(max=swiglu.limit)
    up_TF = up_TF.clamp(-swiglu.limit, swiglu.limit) + swiglu.offset
    return (gate_TF * torch.sigmoid(swiglu.alpha * gate_TF) * up_TF).to(gate_up_T2F.dtype)


def head_products(x_THI: Tensor, weight_HOI: Tensor) -> Tensor:
    """`x @ weight.T` of each head, `[T, H, O]`, rounded once."""
    return torch.bmm(x_THI.transpose(0, 1), weight_HOI.transpose(1, 2)).transpose(0, 1)


def scale_rows(out_TD: Tensor, x_TD: Tensor, gate_D: Tensor) -> Tensor:
    """Each row of `out_TD` times the sigmoid of its `x` row's product with `gate_D`; rounded once.

    Qwen1.5-MoE weighs its shared expert like that.
    """
    score_T1 = (x_TD.float() * gate_D.float()).sum(-1, keepdim=True)
    return (out_TD.float() * score_T1.sigmoid()).to(out_TD.dtype)


def check_contiguous(**operands: Tensor | None) -> None:
    """Refuse operands of a kernel that are not contiguous, by name.

    Raises:
        ValueError: the operand and its strides.
    """
    for name, tensor in operands.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()} are not allowed; it must be contiguous")


def check_gate(
    num_experts: int, top_k: int, scoring: str, num_groups: int, topk_groups: int, groups_by_best: bool = False
) -> None:
    """Refuse a gate that has no meaning.

    Raises:
        ValueError: the field, its value and what is allowed.
    """
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring: {scoring!r} is not allowed; it must be 'softmax' or 'sigmoid'")
    least = 1 if num_groups == 1 or groups_by_best else 2  # of a group
    if num_groups < 1 or num_experts % num_groups or num_experts // num_groups < least:
        raise ValueError(
            f"num_groups: {num_groups} is not allowed; "
            f"it must divide {num_experts} experts into groups of at least {least}"
        )
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups: {topk_groups} is not allowed; it must be from 1 to num_groups ({num_groups})")
    allowed = num_experts // num_groups * topk_groups
    if not 1 <= top_k <= allowed:
        raise ValueError(f"top_k: {top_k} is not allowed; it must be from 1 to the {allowed} experts of kept groups")


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
    """Choose each token's experts and their weights, as transformers does for Qwen3-MoE, Mixtral and GLM-4 MoE.

    Scores are the softmax over all experts or the sigmoid of each logit, in float32. Experts are chosen by score plus
    correction bias; with groups, only from the `topk_groups` groups whose two best choices have the largest sum
    (DeepSeek-V3, arXiv:2412.19437), or whose best choice is largest if `groups_by_best` (DeepSeek-V2,
    arXiv:2405.04434). Weights are the scores without bias, divided by their sum if `normalize`,
    then times `scale`.

    Args:
        logits_TE: float32 or lower.
        correction_bias_E: float32 and finite.

    Returns:
        `(weights_TK float32, experts_TK int64)`, best choice first, equal choices by the lower expert number.

    Raises:
        ValueError: the groups do not divide the experts, or `top_k` exceeds the experts of the kept groups.
    """
    check_gate(logits_TE.shape[1], top_k, scoring, num_groups, topk_groups, groups_by_best)
    scores_TE, choice_TE = gate_scores(
        logits_TE,
        scoring=scoring,
        correction_bias_E=correction_bias_E,
        num_groups=num_groups,
        topk_groups=topk_groups,
        groups_by_best=groups_by_best,
    )
    experts_TK = _stable_topk(choice_TE, top_k)
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * scale, experts_TK


def gate_scores(
    logits_TE: Tensor,
    *,
    scoring: Scoring,
    correction_bias_E: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    groups_by_best: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(scores_TE, choice_TE)` in float32: `topk_gate` weights experts by the scores and chooses them by the choice.

    The choice is `-inf` for experts of groups that are not kept.
    """
    logits_TE = logits_TE.float()
    # In float64: in float32, the ends of torch's CPU loops differ in the last bits from the rest.
    scores_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.double().sigmoid().float()
    choice_TE = scores_TE if correction_bias_E is None else scores_TE + correction_bias_E
    if num_groups > 1:
        choice_TE = _mask_groups(choice_TE, num_groups, topk_groups, 1 if groups_by_best else 2)
    return scores_TE, choice_TE


def _stable_topk(scores: Tensor, k: int) -> Tensor:
    """Positions of the `k` largest along the last dimension; `torch.topk` does not define the order of equal values."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


def _mask_groups(choice_TE: Tensor, num_groups: int, topk_groups: int, num_best: int) -> Tensor:
    choice_TgE = choice_TE.view(len(choice_TE), num_groups, choice_TE.shape[1] // num_groups)
    group_score_Tg = choice_TgE.topk(num_best, dim=-1).values.sum(-1)
    kept_Tg = torch.zeros_like(group_score_Tg, dtype=torch.bool)
    kept_Tg.scatter_(1, _stable_topk(group_score_Tg, topk_groups), True)
    return choice_TgE.masked_fill(~kept_Tg[..., None], float("-inf")).flatten(1)


def argmax(x_TV: Tensor) -> list[int]:
    """Position of the largest value of each row, -1 for a row with a value that is NaN or infinite."""
    best_T = x_TV.argmax(dim=-1)
    tokens: list[int] = best_T.where(x_TV.sum(dim=-1, dtype=torch.float64).isfinite(), -1).tolist()
    return tokens


def group_by_slot(slot_R: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Group rows by slot, keeping their order within a slot; rows of slot -1 are left out.

    Leaving rows out makes the size of the result depend on the data, so on a GPU this waits for the device.

    Args:
        slot_R: int64, from -1 to `num_slots - 1`.

    Returns:
        `(order, counts_S)`, int64: the positions of the kept rows, slot after slot, and how many each slot has.
    """
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=slot_R.device)
    counts.scatter_add_(0, slot_R + 1, torch.ones_like(slot_R))
    order_R = slot_R.argsort(stable=True)
    return order_R[int(counts[0]) :], counts[1:]


def group_by_slot_padded(slot_R: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """`group_by_slot` with results of fixed size, so that nothing waits for the device: rows of slot -1 come last.

    Args:
        slot_R: int64, from -1 to `num_slots - 1`.

    Returns:
        `(order_R, place_R, counts_S)`, int64: the row at each place of the grouped order, the place of each row (-1 if
        it has no slot), and how many rows each slot has.
    """
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=slot_R.device)
    bucket_R = torch.where(slot_R < 0, num_slots, slot_R)
    counts.scatter_add_(0, bucket_R, torch.ones_like(bucket_R))
    order_R = bucket_R.argsort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return order_R, torch.where(slot_R < 0, -1, place_R), counts[:num_slots]


def check_grouped_mlp(
    x_ND: Tensor,
    row_R: Tensor | None,
    counts_S: Tensor,
    w13_SGD: MatrixSlots,
    w2_SDF: MatrixSlots,
    b13_SG: Tensor | None,
    b2_SD: Tensor | None,
) -> None:
    """Refuse operands of `grouped_mlp` that do not fit together.

    Raises:
        ValueError: the operand, its shape or dtype and what is allowed.
    """
    num_slots, hidden, intermediate = w2_SDF.shape
    if w13_SGD.shape != (num_slots, 2 * intermediate, hidden):
        raise ValueError(
            f"w13_SGD: shape {tuple(w13_SGD.shape)} does not fit w2_SDF {tuple(w2_SDF.shape)}; "
            f"it must be {(num_slots, 2 * intermediate, hidden)}"
        )
    if x_ND.ndim != 2 or x_ND.shape[1] != hidden:
        raise ValueError(f"x_ND: shape {tuple(x_ND.shape)} is not allowed; it must be [rows, {hidden}]")
    dtypes = [x.dtype for x in (x_ND, w13_SGD, w2_SDF) if isinstance(x, Tensor)]
    if len(set(dtypes)) > 1:
        raise ValueError(f"dtypes {', '.join(map(str, dtypes))} of x, w13 and w2 must be equal")
    if counts_S.shape != (num_slots,) or counts_S.dtype != torch.int64:
        raise ValueError(f"counts_S: {counts_S.dtype} {tuple(counts_S.shape)} must be int64 of {num_slots} slots")
    if row_R is not None and (row_R.ndim != 1 or row_R.dtype != torch.int64):
        raise ValueError(f"row_R: {row_R.dtype} {tuple(row_R.shape)} must be a vector of int64")
    for name, bias, outputs in (("b13_SG", b13_SG, 2 * intermediate), ("b2_SD", b2_SD, hidden)):
        if bias is not None and (bias.shape != (num_slots, outputs) or bias.dtype != x_ND.dtype):
            raise ValueError(
                f"{name}: {bias.dtype} {tuple(bias.shape)} is not allowed; it must be {x_ND.dtype} "
                f"{(num_slots, outputs)}"
            )


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
    """SwiGLU experts over rows grouped by slot: `w2 @ swiglu(w_gate @ x + b_gate, w_up @ x + b_up) + b2` for each row.

    The activation is rounded to the dtype of `x_ND` between the two products with weights, and so is the result, once.
    Biases are added in float32, before any rounding. This form also rounds gate and up before the activation.
    Quantised weights are decoded in float32 and rounded to the dtype of `x_ND` (`quantized_slots.dense`).

    Args:
        x_ND: input rows.
        row_R: int64, the input row at each place of the grouped order; `None` if the rows are already in that order.
        counts_S: int64, rows of each slot; the first `counts_S[0]` places belong to slot 0. If they sum to less than R,
            the remaining places are not computed: their values are undefined.
        w13_SGD: `[S, 2 * F, D]`, the rows of `w_gate`, then those of `w_up`.
        w2_SDF: `[S, D, F]`.
        b13_SG, b2_SD: in the dtype of `x_ND`; `b13_SG` has the biases of `w_gate`, then those of `w_up`.
        swiglu: default `silu(gate) * up`.

    Returns:
        `[R, D]` in the grouped order.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_grouped_mlp(x_ND, row_R, counts_S, w13_SGD, w2_SDF, b13_SG, b2_SD)
    rows_RD = x_ND if row_R is None else x_ND[row_R]
    counts = counts_S.tolist()
    assert sum(counts) <= rows_RD.shape[0], (sum(counts), rows_RD.shape[0])
    out_RD = torch.empty_like(rows_RD)
    start = 0
    for slot, count in enumerate(counts):
        if count:
            group = slice(start, start + count)
            w13_GD, w2_DF = dense(w13_SGD[slot], x_ND.dtype), dense(w2_SDF[slot], x_ND.dtype)
            gate_up = F.linear(rows_RD[group], w13_GD, None if b13_SG is None else b13_SG[slot])
            hidden = silu_mul(gate_up) if swiglu == PLAIN else swiglu_mul(gate_up, swiglu)
            out_RD[group] = F.linear(hidden, w2_DF, None if b2_SD is None else b2_SD[slot])
            start += count
    return out_RD


def combine_topk(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's expert rows: in order of `k`, in float32, rounded once to the dtype of `y_TKD`."""
    weights_KT1 = weights_TK.float().T[..., None]
    out_TD = y_TKD[:, 0].float() * weights_KT1[0]
    for k in range(1, y_TKD.shape[1]):
        out_TD += y_TKD[:, k].float() * weights_KT1[k]
    return out_TD.to(y_TKD.dtype)


def combine_grouped(y_RD: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """`combine_topk` of rows in the grouped order; a (token, k) without a place counts as zero.

    Args:
        place_TK: int64, the row of `y_RD` for each (token, k), or -1; as `group_by_slot_padded` returns it.
    """
    if not len(y_RD):
        return y_RD.new_zeros(len(place_TK), y_RD.shape[1])
    y_TKD = y_RD[place_TK.clamp(min=0)]
    return combine_topk(y_TKD.masked_fill_((place_TK < 0)[..., None], 0), weights_TK)
