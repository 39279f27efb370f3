"""The parts of a decoder layer that are one native call each.

Their C structs hold what does not change, so that a call passes a few pointers. A block may include the norm after it:
called with the residual rows, it adds its output to them in place and returns the norm of the sum. Shape suffixes are
those of `native`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.kernels.cpu import structs
from moe_runtime.kernels.cpu.kv_pages import kv_pages
from moe_runtime.kernels.cpu.native import Kernels, check_arrived, element
from moe_runtime.kernels.cpu.native_step import NativeStep, pointer
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear
from moe_runtime.kernels.cpu.structs import AttentionShape, GateConfig, HeadOps
from moe_runtime.kernels.kv_rows import KVScales

HEAD_NORMS = {None: 0, "head": 1, "token": 2, "rotated_head": 3}  # `HeadNorm` of heads.h


@dataclass(frozen=True)
class NextNorm:
    """The norm after a block: `residual += multiplier * output`, then the norm of the residual.

    See `torch_ops.add_rms_norm`.
    """

    weight_D: Tensor
    eps: float
    multiplier: float = 1.0


class AttentionCall:
    """From normed hidden states to the attention's output: QKV projection, head norms, rotary embedding, cache write,
    attention, output projection.

    Args:
        qkv: projection to `(H + 2 G) * d`; query rows, key rows, value rows.
        output: projection from `H * d`.
        qk_norm: which norm queries and keys have, as in `AttentionConfig`.
        q_norm, k_norm: its weights, or None.
        sinks_H: float32, see `AttentionShape`; None: no sinks.
        next_norm: the norm after the block, or None.
    """

    def __init__(
        self,
        kernels: Kernels,
        qkv: PackedLinear,
        output: PackedLinear,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        sliding_window: int | None,
        qk_norm: str | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        next_norm: NextNorm | None = None,
        sinks_H: Tensor | None = None,
    ) -> None:
        assert qkv.outputs == (num_heads + 2 * num_kv_heads) * head_dim and output.inputs == num_heads * head_dim
        assert num_heads % num_kv_heads == 0
        self.kernels, self.qkv, self.output = kernels, qkv, output
        self.struct = structs.AttentionStruct(
            next_norm_struct(next_norm),
            AttentionShape(
                heads=num_heads,
                kv_heads=num_kv_heads,
                head_size=head_dim,
                value_size=head_dim,
                window=sliding_window or 0,
                sinks=pointer(sinks_H),
                scale=scale,
            ),
            HeadOps(pointer(q_norm), pointer(k_norm), eps, HEAD_NORMS[qk_norm]),
            qkv.weight,
            pointer(qkv.bias),
            output.weight,
            pointer(output.bias),
        )
        self.address = ctypes.addressof(self.struct)
        self.next_norm = next_norm
        self._keep = (q_norm, k_norm, sinks_H)
        self.dtype = qkv.dtype
        self.element = qkv.element

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.output.nbytes

    def __call__(
        self,
        x_TD: Tensor,
        step: NativeStep,
        k_cache_NBGd: Tensor,
        v_cache_NBGd: Tensor,
        residual_TD: Tensor | None = None,
        *,
        kv_scales: KVScales | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """`[T, D]`; with `in_place` it overwrites `x_TD`. Writes the tokens' keys and values into the cache.

        `kv_scales` are those of a cache whose rows have 8 bits.
        """
        assert x_TD.dtype == self.dtype and len(x_TD) == step.layout.tokens
        assert kv_scales is not None or k_cache_NBGd.dtype == self.dtype
        pages = kv_pages(k_cache_NBGd, v_cache_NBGd, kv_scales)
        out_TD = x_TD if in_place else torch.empty(len(x_TD), self.output.outputs, dtype=self.dtype)
        assert out_TD.shape == (len(x_TD), self.output.outputs)
        self.kernels.library.moe_attention_block(
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


@dataclass(frozen=True)
class LayerPolicies:
    """The expert policies that a step applies to a layer's gate.

    Attributes:
        policy_T: int64, each token's index into `policies_P4`, 0 for none; None: no token has one.
        policies_P4: float32 `[P, 4]`, a `Policy` of `gate.h` each; the first is not read.
        chosen_TK: int16, filled with the experts that each token uses, -1 for none; None: not kept.
    """

    policy_T: Tensor | None = None
    policies_P4: Tensor | None = None
    chosen_TK: Tensor | None = None

    def struct(self, num_tokens: int, top_k: int) -> structs.PoliciesStruct:
        """The C struct; the tensors must outlive the call."""
        policy, policies, chosen = self.policy_T, self.policies_P4, self.chosen_TK
        assert policy is None or (policy.dtype == torch.int64 and policy.shape == (num_tokens,))
        assert (policy is None) == (policies is None)
        assert policies is None or (policies.dtype == torch.float32 and policies.shape[1:] == (4,))
        assert chosen is None or (chosen.dtype == torch.int16 and chosen.shape == (num_tokens, top_k))
        return structs.PoliciesStruct(pointer(policy), pointer(policies), pointer(chosen))


NO_POLICIES = LayerPolicies()


class GateCall:
    """The product with the gate's weight, the gate, and counts.

    Args:
        config: from `native.gate_config`.
        weight_ED: in the model's dtype or in float32.
        logit_bias_E: added to the product, in the weight's dtype; or None.
        counts_2E: int64, tokens of each expert in prefill and decode; every call adds to them. None counts nothing.
            The rows need not be adjacent, so it may be a layer of a larger tensor.
    """

    def __init__(
        self,
        kernels: Kernels,
        config: GateConfig,
        weight_ED: Tensor,
        counts_2E: Tensor | None = None,
        logit_bias_E: Tensor | None = None,
    ) -> None:
        assert len(weight_ED) == config.experts
        assert counts_2E is None or (counts_2E.dtype == torch.int64 and counts_2E.stride(1) == 1)
        self.kernels = kernels
        self.top_k = config.top_k
        self.linear = PackedLinear.pack(kernels, weight_ED, logit_bias_E)
        self.struct = structs.GateStruct(
            config,
            self.linear.weight,
            pointer(logit_bias_E),
            weight_ED.dtype == torch.float32,
            None if counts_2E is None else counts_2E.data_ptr(),
            0 if counts_2E is None else counts_2E.stride(0),
        )
        self.address = ctypes.addressof(self.struct)
        self.num_experts = config.experts
        self._keep = (config.keep, counts_2E)

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(
        self, x_TD: Tensor, num_decode: int, policies: LayerPolicies = NO_POLICIES
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(weights_TK float32, experts_TK int64, logits_TE float32)`, best first, -1 where a policy drops one.

        Counts the choices.
        """
        assert x_TD.shape[1] == self.linear.inputs
        logits_TE = torch.empty(len(x_TD), self.num_experts)
        weights_TK = torch.empty(len(x_TD), self.top_k)
        experts_TK = torch.empty(len(x_TD), self.top_k, dtype=torch.int64)
        asked = policies.struct(len(x_TD), self.top_k)
        self.kernels.library.moe_choose_experts(
            element(x_TD),
            self.address,
            ctypes.addressof(asked),
            pointer(x_TD),
            len(x_TD),
            num_decode,
            logits_TE.data_ptr(),
            weights_TK.data_ptr(),
            experts_TK.data_ptr(),
        )
        return weights_TK, experts_TK, logits_TE


class SparseCall:
    """The whole sparse block: gate, experts, weighted sum, shared experts.

    Args:
        slot_EP: int64, the slots that each expert's rows go to in turn; P is a power of two. Its values may change.
        shared: the experts that every token uses, as one slot; or None.
        next_norm: the norm after the block, or None.
        exchange: address of the exchange with all ranks; `slot_EP` then has global slots. None: this rank has all
            experts.
    """

    def __init__(
        self,
        gate: GateCall,
        slot_EP: Tensor,
        experts: PackedExperts,
        shared: PackedExperts | None,
        next_norm: NextNorm | None = None,
        exchange: int | None = None,
    ) -> None:
        assert shared is None or shared.num_slots == 1
        assert slot_EP.dtype == torch.int64 and len(slot_EP) == gate.num_experts and int(slot_EP.min()) >= 0
        assert slot_EP.shape[1].bit_count() == 1
        assert exchange is not None or int(slot_EP.max()) < experts.num_slots
        self.gate, self.experts, self.shared, self.next_norm = gate, experts, shared, next_norm
        self.struct = structs.SparseStruct(
            next_norm_struct(next_norm),
            gate.address,
            experts.address,
            None if shared is None else shared.address,
            exchange,
            structs.ReplicasStruct(pointer(slot_EP), slot_EP.shape[1]),
        )
        self.address = ctypes.addressof(self.struct)
        self.has_exchange = exchange is not None
        self._keep = slot_EP
        self._element = experts.element

    def __call__(
        self,
        x_TD: Tensor,
        num_decode: int,
        residual_TD: Tensor | None = None,
        policies: LayerPolicies = NO_POLICIES,
        spread: structs.SpreadStep | None = None,
    ) -> Tensor:
        """`[T, D]`; the first `num_decode` rows are counted as decode. An exchange needs `spread`.

        Raises:
            TimeoutError: a rank did not come to the exchange in time.
        """
        assert x_TD.dtype == self.experts.dtype and x_TD.shape[1] == self.experts.hidden_size
        assert self.has_exchange == (spread is not None)
        out_TD = torch.empty_like(x_TD)
        residual = residual_pointer(self.next_norm, residual_TD, out_TD)
        asked = policies.struct(len(x_TD), self.gate.top_k)
        late = self.experts.kernels.library.moe_sparse_block(
            self._element,
            self.address,
            ctypes.addressof(asked),
            structs.address(spread),
            pointer(x_TD),
            len(x_TD),
            num_decode,
            residual,
            out_TD.data_ptr(),
        )
        if spread is not None:
            check_arrived(late, spread.timeout_ns)
        return out_TD


class DenseCall:
    """A SwiGLU for all rows: an expert's weights in one slot.

    Args:
        next_norm: the norm after the block, or None.
    """

    def __init__(self, mlp: PackedExperts, next_norm: NextNorm | None = None) -> None:
        assert mlp.num_slots == 1
        self.mlp, self.next_norm = mlp, next_norm
        self.struct = structs.DenseStruct(next_norm_struct(next_norm), mlp.address)
        self.address = ctypes.addressof(self.struct)
        self._element = mlp.element

    def __call__(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        """`[T, D]`."""
        assert x_TD.dtype == self.mlp.dtype and x_TD.shape[1] == self.mlp.hidden_size
        out_TD = torch.empty_like(x_TD)
        residual = residual_pointer(self.next_norm, residual_TD, out_TD)
        self.mlp.kernels.library.moe_dense_block(
            self._element, self.address, pointer(x_TD), len(x_TD), residual, out_TD.data_ptr()
        )
        return out_TD


def next_norm_struct(norm: NextNorm | None) -> structs.NextNormStruct:
    if norm is None:
        return structs.NextNormStruct(None, 0.0, 1.0)
    return structs.NextNormStruct(pointer(norm.weight_D), norm.eps, norm.multiplier)


def residual_pointer(norm: NextNorm | None, residual_TD: Tensor | None, out_TD: Tensor) -> int | None:
    assert (norm is None) == (residual_TD is None), "a block with a norm takes the residual, one without does not"
    if residual_TD is None:
        return None
    assert residual_TD.shape == out_TD.shape and residual_TD.dtype == out_TD.dtype
    return pointer(residual_TD)
