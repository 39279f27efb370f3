"""The dense model as a transformers module, for the calibration and for comparison with the carved model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe_runtime.demo.gguf_model import DenseModel


def load_dense(dense: DenseModel) -> LlamaForCausalLM:
    """`LlamaForCausalLM` in float32 with the exact dequantised weights, in eval mode."""
    sizes = dense.sizes
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=sizes.context_length,
        rms_norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=dense.field("tokenizer.ggml.bos_token_id"),
        eos_token_id=dense.field("tokenizer.ggml.eos_token_id"),
        pad_token_id=dense.field("tokenizer.ggml.padding_token_id"),
    )
    state = {"model.embed_tokens.weight": dense.embedding(), "model.norm.weight": dense.final_norm()}
    for layer in range(sizes.num_layers):
        tensors = dense.layer(layer)
        for name, weight in zip(("gate", "up", "down"), dense.ffn(layer), strict=True):
            tensors[f"mlp.{name}_proj.weight"] = weight
        state |= {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
    model = LlamaForCausalLM(config).eval()
    loaded = model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys, loaded  # the head is tied
    return model
