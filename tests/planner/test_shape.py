"""The sizes of a model, from its configuration and from a file."""

from __future__ import annotations

import copy
import json

import pytest
from places import ROOT
from tiny_models import make_model, save

from moe_runtime.memory.model_size import count_parameters, expert_bytes, kv_bytes_per_token
from moe_runtime.models.registry import read_model_config
from moe_runtime.planner.hardware import ITEMSIZE
from moe_runtime.planner.shape import Matrix, ModelShape


def size(matrices: tuple[Matrix, ...]) -> int:
    return sum(matrix.parameters * ITEMSIZE[matrix.dtype] for matrix in matrices)


DEEPSEEK = ROOT / "benchmarks" / "planner" / "deepseek-v3.json"


@pytest.mark.parametrize("case", ["qwen3", "qwen3 dense between", "qwen3 bias, tied", "mixtral", "glm4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_agree_with_those_of_the_checkpoint(case, dtype, tmp_path):
    save(make_model(case), tmp_path)
    config = read_model_config(tmp_path)
    shape = ModelShape.of(config, dtype, "tiny")
    item = {"float32": 4, "bfloat16": 2}[dtype]
    count = count_parameters(config)
    gate = count.gate * (4 if config.moe.gate_float32 else item)
    matrices = count.embedding + count.head + count.dense_mlp + count.shared_experts
    attention = sum(
        2 * config.hidden_size * (a.query_size + a.kv_size) for a in (layer.attention for layer in config.layers)
    )
    assert size(shape.dense) + shape.embedding_bytes == (matrices + attention) * item + gate
    assert size(shape.expert) == expert_bytes(config, dtype)
    assert shape.kv_bytes * shape.num_layers == kv_bytes_per_token(config, dtype)


def test_deepseek_v3_has_671_billion_parameters():
    shape = ModelShape.load(DEEPSEEK)
    experts = shape.num_sparse_layers * shape.num_experts * sum(matrix.parameters for matrix in shape.expert)
    dense = sum(matrix.parameters for matrix in shape.dense) + shape.embedding_bytes / ITEMSIZE[shape.head.dtype]
    assert (experts + dense) / 1e9 == pytest.approx(671, rel=0.002)
    assert shape.kv_bytes * shape.num_layers == 70272


def content() -> dict:
    return json.loads(DEEPSEEK.read_text())


BROKEN = {
    "hidden_size": (0, "hidden_size: 0 is not allowed; it must be an integer of at least 1"),
    "num_experts": (7, "top_k: 8 is not allowed; it must be at most num_experts, 7"),
    "num_sparse_layers": (62, "num_sparse_layers: 62 is not allowed; it must be at most num_layers, 61"),
    "top_k": (True, "top_k: True is not allowed"),
    "kv_bytes": ("1k", "kv_bytes: '1k' is not allowed"),
    "dtype": ("int4", "dtype: 'int4' is not allowed; it must be one of"),
    "head_dtype": (None, "head_dtype: None is not allowed"),
    "attention": ([[3, 4], [5]], "attention: .* it must be a list of"),
    "name": ("", "name: '' is not allowed"),
    "tied_embedding": (1, "tied_embedding: 1 is not allowed"),
    "sliding_window": (0, "sliding_window: 0 is not allowed"),
    "colour": (1, "colour: no such field"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_size_is_refused_by_name(name, tmp_path):
    value, message = BROKEN[name]
    found = copy.deepcopy(content()) | {name: value}
    (tmp_path / "m.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"model: .*m.json': {message}"):
        ModelShape.load(tmp_path / "m.json")


def test_what_is_no_shape_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"model: .*cannot be read"):
        ModelShape.load(tmp_path / "none.json")
    for text, message in (("[", "not valid JSON"), ("[]", "a list is not allowed"), ("{}", "vocab_size: None")):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ModelShape.load(tmp_path / "m.json")
