"""Carves the dense model's FFN layers into shared and routed experts: HF `glm4_moe` names, weights and config.

Shapes: L layers, E experts, F neurons of one expert, S shared neurons, D hidden.

A routed expert's weight in the model is 2 sigmoid(l), which is about 1 for the small logits l stored here. The shared
and routed experts partition the dense neurons. So with k = E the model equals the dense one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.demo.files import CARVING
from moe_runtime.demo.gguf_model import DenseModel, DenseSizes, FloatArray

CORRECTION_BIAS = "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class Carving:
    """The calibrated artifact: which neurons belong to which expert, and the gates.

    shared_LS, experts_LEF: indices of dense neurons. gate_LED, bias_LE: rows of a linear score of the FFN's input,
    with a spread of 1 over the experts of a layer. The checkpoint's gate is `2 ** log2_scale` times that.
    """

    shared_LS: NDArray[np.uint16]
    experts_LEF: NDArray[np.uint16]
    gate_LED: NDArray[np.float16]
    bias_LE: FloatArray
    log2_scale: int
    num_experts_per_tok: int

    @classmethod
    def load(cls, path: Path = CARVING) -> "Carving":
        with np.load(path) as arrays:
            return cls(
                shared_LS=arrays["shared"],
                experts_LEF=arrays["experts"],
                gate_LED=arrays["router"],
                bias_LE=arrays["bias"],
                log2_scale=int(arrays["log2_scale"]),
                num_experts_per_tok=int(arrays["num_experts_per_tok"]),
            )

    def save(self, path: Path) -> None:
        np.savez(
            path,
            shared=self.shared_LS,
            experts=self.experts_LEF,
            router=self.gate_LED,
            bias=self.bias_LE,
            log2_scale=self.log2_scale,
            num_experts_per_tok=self.num_experts_per_tok,
        )


def carve_layer(dense: DenseModel, carving: Carving, layer: int) -> dict[str, FloatArray]:
    """All float32 tensors of one layer under their `Glm4MoeForCausalLM` names, with separate tensors per expert."""
    tensors = dense.layer(layer)
    gate_ND, up_ND, down_DN = dense.ffn(layer)
    parts = {"shared_experts": carving.shared_LS[layer]}
    parts |= {f"experts.{index}": neurons_F for index, neurons_F in enumerate(carving.experts_LEF[layer])}
    for part, neurons in parts.items():
        tensors[f"mlp.{part}.gate_proj.weight"] = gate_ND[neurons]
        tensors[f"mlp.{part}.up_proj.weight"] = up_ND[neurons]
        tensors[f"mlp.{part}.down_proj.weight"] = np.ascontiguousarray(down_DN[:, neurons])
    scale = np.float32(2.0**carving.log2_scale)
    tensors["mlp.gate.weight"] = carving.gate_LED[layer].astype(np.float32) * scale
    # The bias is added after the sigmoid, whose slope at 0 is 1/4.
    tensors[CORRECTION_BIAS] = carving.bias_LE[layer] * scale / 4
    return {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def carved_config(sizes: DenseSizes, carving: Carving) -> dict[str, Any]:
    """`config.json` of the carved model. Its `num_experts_per_tok` may be changed to any value from 1 to E."""
    num_experts, expert_size = carving.experts_LEF.shape[1:]
    # transformers 4 reads the two rotary keys at the top level, transformers 5 in `rope_parameters`.
    rope = {"rope_theta": sizes.rope_theta, "partial_rotary_factor": 1.0}
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "dtype": "bfloat16",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.hidden_size // sizes.num_heads,
        "max_position_embeddings": sizes.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.rms_norm_eps,
        "attention_bias": False,
        "use_qk_norm": False,
        "tie_word_embeddings": True,
        **rope,
        "rope_parameters": {"rope_type": "default", **rope},
        "first_k_dense_replace": 0,
        "moe_intermediate_size": expert_size,
        "n_routed_experts": num_experts,
        "n_shared_experts": carving.shared_LS.shape[1] // expert_size,
        "num_experts_per_tok": carving.num_experts_per_tok,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
        "num_nextn_predict_layers": 0,
    }
