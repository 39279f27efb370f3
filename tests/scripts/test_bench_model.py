"""The bench models: the same for the same seed, accepted by the runtime, with the same numbers in their GGUF files."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from places import SCRIPTS
from safetensors.torch import load_file
from torch import Tensor

MODULES = ("make_bench_model", "bench_model")
TINY = {
    "bench": ("Qwen3Moe", (2, 64, 4, 2, 16, 4, 2, 32, 100)),
    "bench-mla": ("DeepseekV3", (2, 64, 4, 48, 32, 16, 8, 16, 4, 2, 1, 32, 1, 96, 100)),
    "bench-gpt-oss": ("GptOss", (2, 64, 4, 2, 16, 8, 4, 2, 32, 100)),
}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch):
    """`make_bench_model`, with tiny sizes in the shapes."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("make_bench_model")
    for name, (family, sizes) in TINY.items():
        monkeypatch.setitem(module.SHAPES, name, getattr(module, family)(*sizes))
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]


def test_a_model_is_the_same_for_the_same_seed(make, tmp_path, monkeypatch):
    first, second = (make.ensure_bench_model("bench", tmp_path / name) for name in ("a", "b"))
    weights, again = (load_file(folder / make.WEIGHTS) for folder in (first, second))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    assert json.loads((first / "config.json").read_text())["num_experts"] == 4
    written = (first / make.WEIGHTS).stat().st_mtime_ns
    make.ensure_bench_model("bench", first)
    assert (first / make.WEIGHTS).stat().st_mtime_ns == written
    make.ensure_gguf(first)
    monkeypatch.setattr(make, "SEED", 1)
    make.ensure_bench_model("bench", first)  # other weights: written again, and the GGUF file of the old ones is gone
    assert not torch.equal(load_file(first / make.WEIGHTS)["lm_head.weight"], weights["lm_head.weight"])
    assert not (first / "model-bf16.gguf").exists()


@pytest.mark.parametrize("shape", TINY)
def test_no_tensor_is_without_effect(make, shape, tmp_path):
    for name, tensor in load_file(make.ensure_bench_model(shape, tmp_path) / make.WEIGHTS).items():
        assert tensor.dtype == torch.bfloat16 and tensor.float().std() > 0.0005, name


@pytest.mark.parametrize("shape", TINY)
def test_the_runtime_runs_it(make, shape, tmp_path):
    from moe_runtime import LLM, SamplingParams

    folder = make.ensure_bench_model(shape, tmp_path)
    with LLM(folder, skip_tokenizer_init=True, max_model_len=32, max_num_seqs=2) as llm:
        out = llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2, temperature=0), False)
    assert len(out[0].outputs[0].token_ids) == 2


@pytest.fixture
def both(make, tmp_path):
    """The tensors of a shape's checkpoint and of its GGUF file."""

    def read(shape: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        folder = make.ensure_bench_model(shape, tmp_path / shape)
        checkpoint, stored = load_file(folder / make.WEIGHTS), stored_in(make.ensure_gguf(folder))
        counts = [sum(tensor.numel() for tensor in tensors.values()) for tensors in (checkpoint, stored)]
        assert counts[0] == counts[1]
        return checkpoint, stored

    return read


def stored_in(path: Path) -> dict[str, Tensor]:
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(np.array(tensor.data))
        data = data.view(torch.bfloat16) if data.dtype == torch.uint8 else data
        found[tensor.name] = data.view(*reversed(tensor.shape.tolist()))
    return found


def test_gguf_of_separate_experts(both):
    ours, theirs = both("bench")
    down = torch.stack([ours[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in range(4)])
    assert torch.equal(theirs["blk.1.ffn_down_exps.weight"], down)
    assert torch.equal(theirs["blk.0.attn_q_norm.weight"], ours["model.layers.0.self_attn.q_norm.weight"].float())


def test_gguf_of_latent_attention(both):
    ours, theirs = both("bench-mla")
    heads, nope, value, latent = 4, 16, 16, 32
    key_value = ours["model.layers.0.self_attn.kv_b_proj.weight"].double()
    latent_L, query_hn = torch.randn(latent).double(), torch.randn(heads, nope).double()
    expanded = (key_value @ latent_L).view(heads, nope + value)
    absorbed_hL = torch.einsum("hLn,hn->hL", theirs["blk.0.attn_k_b.weight"].double(), query_hn)
    torch.testing.assert_close(absorbed_hL @ latent_L, (expanded[:, :nope] * query_hn).sum(1))
    torch.testing.assert_close(theirs["blk.0.attn_v_b.weight"].double() @ latent_L, expanded[:, nope:])
    assert "blk.0.ffn_gate.weight" in theirs and "blk.1.ffn_gate_shexp.weight" in theirs
    bias = ours["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(theirs["blk.1.exp_probs_b.bias"], bias.float())


def test_gguf_of_interleaved_experts(both):
    ours, theirs = both("bench-gpt-oss")
    x_D, experts = torch.randn(64).double(), "model.layers.1.mlp.experts"
    gate_up = x_D @ ours[f"{experts}.gate_up_proj"].double() + ours[f"{experts}.gate_up_proj_bias"].double()
    for first, part in enumerate(("gate", "up")):
        weight, bias = (theirs[f"blk.1.ffn_{part}_exps.{kind}"].double() for kind in ("weight", "bias"))
        torch.testing.assert_close(weight @ x_D + bias, gate_up[:, first::2])
    assert torch.equal(theirs["blk.1.ffn_down_exps.weight"], ours[f"{experts}.down_proj"].transpose(1, 2))
    assert torch.equal(theirs["blk.0.attn_sinks.weight"], ours["model.layers.0.self_attn.sinks"].float())


def test_gguf_says_what_the_configuration_says(make, tmp_path):
    import gguf

    def value(shape: str, key: str) -> object:
        folder = make.ensure_bench_model(shape, tmp_path / shape)
        return gguf.GGUFReader(make.ensure_gguf(folder)).fields[key].contents()

    assert value("bench", "qwen3moe.attention.head_count_kv") == 2
    assert value("bench-mla", "deepseek2.attention.key_length_mla") == 24
    assert value("bench-mla", "deepseek2.expert_gating_func") == gguf.ExpertGatingFuncType.SIGMOID
    assert value("bench-gpt-oss", "gpt-oss.rope.scaling.type") == "yarn"
    assert math.isclose(value("bench-gpt-oss", "gpt-oss.rope.freq_base"), 150_000.0)
