"""Sizes from the configuration only, compared with transformers' models and with real ranks."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CASES, make_model, save

from moe_runtime.config.attention import AttentionConfig
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig, MoEConfig, RopeConfig, layers_alike
from moe_runtime.config.quantization import quantized
from moe_runtime.kernels.cpu.loader import load_or_none
from moe_runtime.kernels.cpu.native import Kernels
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedMatrices
from moe_runtime.memory import model_size as size
from moe_runtime.memory.budget import has_native_weights
from moe_runtime.memory.initial_placement import slots_per_rank
from moe_runtime.models.registry import read_model_config

KNOWN = ModelConfig(
    family="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    rms_norm_eps=1e-6,
    max_position_embeddings=40960,
    rope=RopeConfig(theta=1e6, rotary_dim=128),
    moe=MoEConfig(num_experts=128, top_k=8, intermediate_size=768),
    layers=layers_alike(48, AttentionConfig(32, 4, 128, qk_norm="head"), range(48), 6144),
    tie_word_embeddings=False,
    dtype="bfloat16",
    eos_token_ids=(1,),
)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_checkpoint(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    count = size.count_parameters(read_model_config(save(model, tmp_path)))
    tensors = dict(model.named_parameters())  # tied ones once
    tensors |= {name: tensor for name, tensor in model.named_buffers() if name.endswith("correction_bias")}
    assert count.total == sum(tensor.numel() for tensor in tensors.values())
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    assert count.num_experts * count.expert == experts
    assert count.dense == count.total - experts
    unused = experts * (1 - model.config.num_experts_per_tok / _num_experts(model.config))
    assert count.active == pytest.approx(count.total - unused)


def _num_experts(config) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def test_a_known_model() -> None:
    """Qwen3-30B-A3B: its card says 30.5B parameters, 29.9B of them beside the embedding and head, and 3.3B active."""
    count = size.count_parameters(KNOWN)
    assert round(count.total / 1e9, 1) == 30.5
    assert round((count.total - count.embedding - count.head) / 1e9, 1) == 29.9
    assert 3.3 <= count.active / 1e9 < 3.4


SIZED = ["qwen3 bias, tied", "qwen3 dense between", "mixtral", "glm4", "glm4 norm, bias"]
SIZED += ["olmoe", "qwen2", "granite shared", "deepseek3", "glm4 lite"]


@pytest.mark.parametrize("case", SIZED)
@pytest.mark.parametrize(
    ("dtype", "num_ranks", "method"),
    [
        ("bfloat16", 1, None),
        ("float32", 2, None),
        ("bfloat16", 3, None),
        ("bfloat16", 1, "int8"),
        ("bfloat16", 2, "int4"),
        ("float32", 1, "mxfp4"),
    ],
)
def test_weights_are_those_that_a_rank_loads(
    case: str, dtype: str, num_ranks: int, method: str | None, tmp_path: Path
) -> None:
    """Ranks leave norms and correction biases out of their figure."""
    from moe_runtime.worker.worker import Worker

    path = save(make_model(case), tmp_path)
    config = quantized(read_model_config(path), method, "experts,attention,head", None)
    options = {"ep_size": num_ranks, "redundant_experts": range(num_ranks)}
    engine = EngineConfig("m", dtype=dtype, device="cpu", max_num_seqs=1, **options)
    for rank, num_slots in enumerate(slots_per_rank(engine, config, num_ranks)):
        loaded = Worker(engine, config, path, rank=rank, num_ranks=num_ranks).info.weight_bytes
        count = size.count_parameters(config)
        norms = count.norms
        for layer in config.layers:
            latent = layer.latent
            norms += sum(layer.grouped.norm_sizes) if latent is None else (latent.query_rank or 0) + latent.latent_size
        expected = size.weight_bytes(config, dtype, num_slots, has_native_weights("cpu"))
        assert loaded == expected - size.ITEMSIZE[dtype] * norms - 4 * count.gate_bias


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load_or_none()
    if found is None:
        pytest.skip("there are no native kernels")
    return found


@given(outputs=st.integers(1, 300), inputs=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_of_a_matrix_are_those_of_native_packing(
    kernels: Kernels, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    packed = PackedMatrices(kernels, dtype, outputs, inputs)
    assert packed.nbytes == packed.format.nbytes(outputs, inputs, native=True)


@given(hidden=st.integers(1, 200), intermediate=st.integers(1, 200), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_bytes_of_an_expert_are_those_of_native_packing(
    kernels: Kernels, hidden: int, intermediate: int, dtype: str
) -> None:
    """Also of an expert that is narrower than a panel."""
    config = dataclasses.replace(
        KNOWN, hidden_size=hidden, moe=dataclasses.replace(KNOWN.moe, intermediate_size=intermediate)
    )
    experts = PackedExperts(kernels, 3, hidden, intermediate, getattr(torch, dtype))
    assert experts.nbytes == 3 * size.expert_bytes(config, dtype, native=True)


@given(experts=st.integers(1, 64), data=st.data())
def test_expected_distinct_experts(experts: int, data: st.DataObject) -> None:
    top_k, tokens = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 200))
    found = size.distinct_experts(experts, top_k, tokens)
    assert size.distinct_experts(experts, top_k, 1) == pytest.approx(top_k)
    assert top_k * (1 - 1e-9) <= found <= min(experts, top_k * tokens) * (1 + 1e-9)
    assert found <= size.distinct_experts(experts, top_k, tokens + 1) * (1 + 1e-9)


def test_expected_distinct_experts_as_drawn() -> None:
    draws = [len({e for _ in range(5) for e in random.sample(range(24), 4)}) for _ in range(4000)]
    assert size.distinct_experts(24, 4, 5) == pytest.approx(sum(draws) / len(draws), abs=0.2)  # about six deviations


@pytest.mark.parametrize("case", ["qwen3 bias, tied", "glm4", "mixtral window"])
def test_what_a_decode_step_reads(case: str, tmp_path: Path) -> None:
    config = read_model_config(save(make_model(case), tmp_path))
    count, dtype = size.count_parameters(config), "float32"
    everything = size.weight_bytes(config, dtype, config.moe.num_experts)
    rows = lambda batch: 0 if config.tie_word_embeddings else 4 * (config.vocab_size - batch) * config.hidden_size  # noqa: E731
    one = size.decode_bytes(config, dtype, 1)
    assert one == pytest.approx(size.dense_bytes(config, dtype) + 4 * count.top_k * count.expert - rows(1))
    assert size.decode_bytes(config, dtype, 90) == pytest.approx(everything - rows(90), rel=1e-3)
    longer = size.decode_bytes(config, dtype, 3, context_len=30) - size.decode_bytes(config, dtype, 3)
    seen = min(30, config.layers[0].attention.sliding_window or 30)
    assert longer == pytest.approx(3 * seen * size.kv_bytes_per_token(config, dtype))


def test_a_page_holds_the_keys_and_values_of_its_tokens(tmp_path: Path) -> None:
    from moe_runtime.layers.kv_cache import KVCache

    config = read_model_config(save(make_model("glm4"), tmp_path))
    cache = KVCache(config, [3], 8, "bfloat16", torch.device("cpu"))
    assert (
        cache.nbytes
        == 3 * sum(size.page_bytes(config, 8, "bfloat16"))
        == 24 * size.kv_bytes_per_token(config, "bfloat16")
    )


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_row_of_8_bits_has_a_scale(dtype: str, tmp_path: Path) -> None:
    grouped, latent = (read_model_config(save(make_model(case), tmp_path / case)) for case in ("glm4", "deepseek3"))
    assert size.kv_bytes_per_token(grouped, dtype) == 3 * 2 * 2 * (16 + 4)  # layers, key and value, heads
    assert size.kv_bytes_per_token(latent, dtype) == 3 * (24 + 8 + 2 * 4)
    assert (size.cache_dtype("auto", "bfloat16"), size.cache_dtype(dtype, "bfloat16")) == ("bfloat16", dtype)


def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for() -> None:
    assert size.weights_dtype("auto", "bfloat16") == "bfloat16"
    assert size.weights_dtype("float32", "float16") == "float32"
    with pytest.raises(ValueError, match=r"^dtype: the checkpoint is float16, which is not supported; choose "):
        size.weights_dtype("auto", "float16")
