"""Engines whose weights are quantised while they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_marks import needs_native_kernels
from quantized_runs import answers
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from tiny_models import make_model, save

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.quantization import METHODS, quantized
from moe_runtime.kernels.quantized import quantize
from moe_runtime.models.registry import read_model_config

PARTS = {
    "experts": ("experts", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "shared_expert"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj"),
    "head": ("lm_head",),
}
LEFT_OUT = ("gate.weight", "shared_expert_gate", "kv_b_proj", "norm", "bias", "embed")


def dequantised(path: Path, out: Path, method: str, parts: str) -> Path:
    """The checkpoint with weights of the values that quantising them gives, in float32."""
    out.mkdir()
    (out / "config.json").write_text((path / "config.json").read_text())
    chosen = [mark for part in parts.split(",") for mark in PARTS[part]]
    tensors = load_file(path / "model.safetensors")
    for name, weight in tensors.items():
        if weight.ndim == 2 and any(mark in name for mark in chosen) and not any(mark in name for mark in LEFT_OUT):
            tensors[name] = quantize(weight, METHODS[method]).dequantize()
        elif weight.ndim == 3 and "experts" in parts:
            turned = json.loads((path / "config.json").read_text())["model_type"] == "gpt_oss"
            values = [quantize(w.T if turned else w, METHODS[method]).dequantize() for w in weight]
            tensors[name] = torch.stack([w.T if turned else w for w in values])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("case", ["qwen3", "deepseek3", "gpt-oss"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_the_dequantised_weights(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, method: str
) -> None:
    path = save(make_model(case), tmp_path / "plain")
    parts = (
        "experts,attention,head" if method == "int8" else "experts,attention" if method == "int4" else "experts,head"
    )
    dense = dequantised(path, tmp_path / "dense", method, parts)
    wanted = answers(rank_pool, dense, dtype="float32")
    for ep_size in (1, 2):
        found = answers(rank_pool, path, ep_size, dtype="float32", quantization=method, quantization_parts=parts)
        assert found[0] == wanted[0]
        assert found[1] == pytest.approx(wanted[1], abs=1e-4)


@needs_native_kernels
@pytest.mark.parametrize("rows", [None, "int8"])
@pytest.mark.parametrize(("case", "method"), [("qwen3", "int8"), ("deepseek3", "int4"), ("gpt-oss", "mxfp4")])
def test_tokens_do_not_depend_on_ranks_batches_or_chunks(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, case: str, method: str, rows: str | None
) -> None:
    """With equal bits, log-probabilities are equal, not close."""
    path = save(make_model(case).bfloat16(), tmp_path)
    options = {"dtype": "bfloat16", "quantization": method, "activation_quantization": rows}
    wanted = answers(rank_pool, path, **options)
    for ep_size, how in (
        (1, {"max_num_batched_tokens": 7, "max_num_seqs": 3}),
        (2, {"dispatcher": "symmetric"}),
        (2, {"dispatcher": "all_to_all", "max_num_batched_tokens": 9, "max_num_seqs": 4}),
        (4, {"dispatcher": "all_gather"}),
    ):
        assert answers(rank_pool, path, ep_size, **options, **how) == wanted, (ep_size, how)


def test_what_is_quantised_already_is_not_quantised_again(tmp_path: Path) -> None:
    model = read_model_config(save(make_model("qwen3"), tmp_path))
    stored = replace(model, head_format=METHODS["fp8"])
    with pytest.raises(ValueError, match=r"^quantization: 'int4' is not allowed; the checkpoint is quantised already"):
        quantized(stored, "int4", "experts", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, r"^quantization: 'int3' is not allowed; it must be one of \['int8', 'int4'"),
        ({"quantization_parts": "experts,gate"}, "^quantization_parts: 'experts,gate' is not allowed"),
        ({"quantization_parts": ""}, "^quantization_parts: '' is not allowed"),
        ({"quantization_group_size": 48}, "^quantization_group_size: 48 is not allowed"),
        ({"quantization_parts": "experts"}, "^quantization_parts: 'experts' is not allowed without quantization"),
        ({"quantization_group_size": 64}, "^quantization_group_size: 64 is not allowed without quantization"),
        ({"quantization": "int4", "quantization_parts": "head,head"}, "^quantization_parts: 'head,head' is not"),
        ({"quantization": "int4", "quantization_group_size": 128.0}, r"^quantization_group_size: 128\.0 is not"),
        ({"quantization": "mxfp4", "quantization_group_size": 64}, "^quantization_group_size: 64 is not allowed with"),
        ({"activation_quantization": "int4"}, "^activation_quantization: 'int4' is not allowed"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("demo", **options)


@pytest.mark.parametrize("method", [None, "fp8"])
def test_rows_are_not_rounded_without_integers_to_multiply(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, method: str | None
) -> None:
    path = save(make_model("qwen3"), tmp_path)
    with pytest.raises(ValueError, match=r"^activation_quantization: 'int8' is not allowed without weights in int8"):
        answers(rank_pool, path, quantization=method, activation_quantization="int8")
