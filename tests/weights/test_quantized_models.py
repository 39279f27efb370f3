"""Whole models in quantised checkpoints against the weights that they stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import CASES, GPT_OSS, Case, mxfp4, part_name
from safetensors.torch import load_file, save_file
from tiny_models import make_model, save

from moe_runtime import LLM, SamplingParams
from moe_runtime.models.expert_tensors import ExpertTensors
from moe_runtime.models.registry import names_of, open_weights, read_model_config
from moe_runtime.weights.quantized import QuantizedCheckpoint

LINEAR = re.compile(r".*\.(experts\.\d+|self_attn|mlp)\.\w+_proj\.weight")
FUSED = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")
Tensors = dict[str, torch.Tensor]


def write_both(path: Path, dense: Path, plain: Tensors, stored: Tensors, settings: dict[str, Any]) -> Path:
    """Give the checkpoint `dense` the weights `plain`, and write another one with quantised weights."""
    config = json.loads((dense / "config.json").read_text())
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for folder, tensors in ((dense, plain), (path, stored)):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "model.safetensors"))
    return path


def make_both(path: Path, case: Case) -> tuple[Path, Path]:
    """Two checkpoints of a model with a dense layer: linear maps quantised, and the same weights in float32."""
    dense = save(make_model("qwen3 dense between"), path / "dense")
    plain = load_file(dense / "model.safetensors")
    stored = dict(plain)
    for name in filter(LINEAR.fullmatch, list(plain)):
        packed = case.pack(*plain[name].shape)
        plain[name] = packed.weight
        del stored[name]
        stored |= {part_name(name, part): tensor for part, tensor in packed.parts.items()}
    return write_both(path / "quantized", dense, plain, stored, case.settings), dense


def make_gpt_oss(path: Path) -> tuple[Path, Path]:
    """The same of gpt-oss, whose experts alone are quantised; in 16 and 32 bits they are transposed."""
    dense = save(make_model("gpt-oss"), path / "dense")
    plain = load_file(dense / "model.safetensors")
    stored = dict(plain)
    for name in filter(FUSED.fullmatch, list(plain)):
        packed = [mxfp4(blocks=True)(*weight_KN.T.shape) for weight_KN in stored.pop(name)]
        plain[name] = torch.stack([one.weight.T for one in packed])
        for part in packed[0].parts:
            stored[part_name(name, part)] = torch.stack([one.parts[part] for one in packed])
    return write_both(path / "quantized", dense, plain, stored, GPT_OSS), dense


def outputs(path: Path) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of prompts, and log-probabilities."""
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": list(range(2, 2 + length))} for length in (3, 11)]
    with LLM(str(path), dtype="float32", skip_tokenizer_init=True) as llm:
        found = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    logprobs = [entry.logprob for output in found for place in output.logprobs or [] for entry in place.values()]
    return [list(output.token_ids) for output in found], torch.tensor(logprobs)


@pytest.mark.parametrize("label", ["fp8 blocks", "compressed int4, zeros", "modelopt nvfp4", "gptq int8, zeros", "awq"])
def test_tokens_are_those_of_the_dequantised_weights(tmp_path: Path, label: str) -> None:
    stored, dense = (outputs(path) for path in make_both(tmp_path, CASES[label]))
    assert stored[0] == dense[0]
    torch.testing.assert_close(stored[1], dense[1], rtol=0, atol=1e-4)


def test_tokens_of_gpt_oss(tmp_path: Path) -> None:
    stored, dense = (outputs(path) for path in make_gpt_oss(tmp_path))
    assert stored[0] == dense[0]
    torch.testing.assert_close(stored[1], dense[1], rtol=0, atol=1e-4)


def experts_of(path: Path) -> tuple[ExpertTensors, Any]:
    config = read_model_config(path)
    source = open_weights(path, config)
    return ExpertTensors(config, names_of(config.family), source), source


@pytest.mark.parametrize("label", ["fp8 blocks", "compressed int4", "gptq int4", "gpt-oss"])
def test_parts_of_experts_and_no_byte_of_others(tmp_path: Path, label: str) -> None:
    paths = make_gpt_oss(tmp_path) if label == "gpt-oss" else make_both(tmp_path, CASES[label])
    (ours, source), (plain, plain_source) = map(experts_of, paths)
    assert isinstance(source, QuantizedCheckpoint)
    layer, count = ours.config.moe_layers[-1], ours.config.moe.num_experts
    file = load_file(paths[0] / "model.safetensors")
    of_layer = {name: tensor.nbytes for name, tensor in file.items() if f"layers.{layer}.mlp.experts." in name}
    of_one = sum(of_layer.values()) // count
    for expert in (0, count - 1):
        source.release_all()
        before, kept, kept_bias, kept_plain = source.bytes_read, {}, {}, {}
        parts = zip(ours.expert(layer, expert), plain.expert(layer, expert), strict=True)
        for (role, stored), (plain_role, dense) in parts:
            assert role == plain_role and (stored.num_rows, stored.num_inputs) == (dense.num_rows, dense.num_inputs)
            rows = range(stored.num_rows)
            expected = dense.read(plain_source, rows, kept_plain)
            if role.endswith("bias"):
                assert torch.equal(stored.read(source, rows, kept_bias), expected)
            else:
                assert torch.equal(stored.read_quantized(source, rows, kept).dequantize(), expected)
        assert source.bytes_read - before == of_one
        for _, stored in ours.expert(layer, expert):
            if source.format_of(stored.name) is not None:
                some = range(3, stored.num_rows - 2)
                found, whole = stored.read_quantized(source, some, {}), stored.read(source, some, {})
                assert torch.equal(found.dequantize(), whole)
                assert all(part.is_contiguous() for part in found.parts if part is not None)
