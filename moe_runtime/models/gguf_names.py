"""Where the tensors of a family's checkpoint lie in its GGUF file, by the names that llama.cpp gives them. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cached_property

from moe_runtime.models.names import SwiGLUNames, TensorNames
from moe_runtime.weights.gguf_file import READABLE, Gguf, Place

PARTS = ("gate", "up", "down")
OUTER = ("token_embd.weight", "output.weight", "output_norm.weight")
ATTENTION_NORM, MLP_NORM, POST_NORM = "attn_norm.weight", "ffn_norm.weight", "post_attention_norm.weight"
KEY_UP, VALUE_UP, LATENT_UP = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"
GATE, CORRECTION_BIAS = "ffn_gate_inp.weight", "exp_probs_b.bias"
FUSED = "ffn_gate_up_exps.weight"  # gate's rows, then up's, of all experts
LAYER = re.compile(r"blk\.(\d+)\.(.+)")


class GgufNames:
    """The places of the tensors of one file's model.

    Args:
        names: of the family's checkpoints.
        present: names of the tensors in the file.
    """

    def __init__(self, names: TensorNames, present: Collection[str]) -> None:
        self._names, self._present = names, present
        before, after = map(re.escape, names.layer.split("{}"))
        self._layer = re.compile(rf"{before}(\d+){after}\.(.+)")
        sparse, expert = re.escape(names.sparse), re.escape(names.expert).replace(r"\{\}", r"(\d+)")
        self._expert_parts = {getattr(names.expert_parts, part): part for part in PARTS}
        parts = "|".join(map(re.escape, self._expert_parts))
        self._expert = re.compile(rf"{sparse}\.{expert}\.({parts})\.(weight|bias)")

    def locate(self, name: str) -> Place | None:
        """The place of a tensor of the checkpoint; None if it is not in the file."""
        outer = (self._names.embedding, self._names.head, self._names.final_norm)
        if name in outer:
            return self._place((OUTER[outer.index(name)],))
        match = self._layer.fullmatch(name)
        return None if match is None else self._in_layer(f"blk.{match[1]}.", match[2])

    def _in_layer(self, prefix: str, name: str) -> Place | None:
        if match := self._expert.fullmatch(name):
            expert, part, kind = int(match[1]), self._expert_parts[match[2]], match[3]
            if part != "down" and kind == "weight" and prefix + FUSED in self._present:
                return Place((prefix + FUSED,), expert, half=PARTS.index(part))
            return self._place((f"{prefix}ffn_{part}_exps.{kind}",), expert)
        if name == f"{self._names.latent.latent_up}.weight" and prefix + LATENT_UP not in self._present:
            return self._place((prefix + KEY_UP, prefix + VALUE_UP), by_head=True)
        return self._place(tuple(prefix + tensor for tensor in self._tensors.get(name, ())))

    def _place(self, tensors: tuple[str, ...], expert: int | None = None, by_head: bool = False) -> Place | None:
        is_there = bool(tensors) and all(tensor in self._present for tensor in tensors)
        return Place(tensors, expert, by_head=by_head) if is_there else None

    @cached_property
    def _tensors(self) -> dict[str, tuple[str, ...]]:
        """The tensors of a layer's block of the file, by the layer's names in the checkpoint; experts are apart."""
        names, latent = self._names, self._names.latent
        modules = {
            names.query: ("attn_q",),
            names.key: ("attn_k",),
            names.value: ("attn_v",),
            names.attention_output: ("attn_output",),
            latent.query_down: ("attn_q_a",),
            latent.query_up: ("attn_q_b",),
            latent.latent_down: ("attn_kv_a_mqa",),
            latent.latent_up: ("attn_kv_b",),
            **_swiglu(names.dense, names.dense_parts, ""),
            **_swiglu(names.shared, names.shared_parts, "_shexp"),
        }
        found = {
            f"{module}.{kind}": tuple(f"{tensor}.{kind}" for tensor in tensors)
            for module, tensors in modules.items()
            for kind in ("weight", "bias")
        }
        has_post_norm = any(name.endswith(POST_NORM) for name in self._present)
        single = {
            names.attention_norm: ATTENTION_NORM,
            names.mlp_norm: POST_NORM if has_post_norm else MLP_NORM,
            names.query_norm: "attn_q_norm.weight",
            names.key_norm: "attn_k_norm.weight",
            names.sinks: "attn_sinks.weight",
            latent.query_norm: "attn_q_a_norm.weight",
            latent.latent_norm: "attn_kv_a_norm.weight",
            names.shared_gate: "ffn_gate_inp_shexp.weight",
            f"{names.sparse}.{names.gate}": GATE,
            f"{names.sparse}.{names.gate_bias}": "ffn_gate_inp.bias",
            f"{names.sparse}.{names.correction_bias}": CORRECTION_BIAS,
        }
        return found | {name: (tensor,) for name, tensor in single.items()}

    @cached_property
    def known(self) -> frozenset[str]:
        """Names within a layer's block of the tensors that may be read."""
        experts = {f"ffn_{part}_exps.{kind}" for part in PARTS for kind in ("weight", "bias")}
        others = {tensor for tensors in self._tensors.values() for tensor in tensors}
        return frozenset({*experts, *others, FUSED, KEY_UP, VALUE_UP})


def check_tensors(gguf: Gguf, names: TensorNames, num_layers: int) -> None:
    """Raise ValueError if a file has a tensor that would not be read, or of a type that cannot be read.

    Layers from `num_layers` on are those of multi-token prediction, which are not read.
    """
    known = GgufNames(names, gguf.tensors).known
    for name, (file, tensor) in gguf.tensors.items():
        match = LAYER.fullmatch(name)
        if match and int(match[1]) >= num_layers:
            continue
        if not (match and match[2] in known) and name not in OUTER:
            raise ValueError(f"model: tensor {name!r} of {file.path} is not supported")
        if tensor.dtype not in READABLE:
            raise ValueError(
                f"quantization: {tensor.dtype} of tensor {name!r} in {file.path} is not supported; "
                f"it must be one of {', '.join(READABLE)}"
            )


def _swiglu(prefix: str, parts: SwiGLUNames, end: str) -> dict[str, tuple[str, ...]]:
    """The modules of a SwiGLU; gate and up are two tensors of the file also where they are one of the checkpoint."""
    modules: dict[str, tuple[str, ...]] = {f"{prefix}.{getattr(parts, part)}": (f"ffn_{part}{end}",) for part in PARTS}
    if parts.gate_up:
        modules[f"{prefix}.{parts.gate_up}"] = (f"ffn_gate{end}", f"ffn_up{end}")
    return modules
