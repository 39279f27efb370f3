"""Matrices of GGUF files that are held in their codes."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from engines import Pools
from gguf import GGMLQuantizationType as Kind
from gguf_models import edited, write_gguf
from gguf_runs import logits
from k_quants import K_QUANTS
from kernel_marks import needs_native_kernels
from quantized_runs import answers
from tiny_models import make_model, save

from moe_runtime.memory.model_size import expert_bytes
from moe_runtime.models.registry import open_weights, read_model_config
from moe_runtime.types.weight_format import BlockFormats, Code, Scale, WeightFormat
from moe_runtime.weights.checked import CheckedWeights
from moe_runtime.weights.gguf import GgufWeights
from moe_runtime.weights.gguf_file import FORMATS

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2}


def quantised(tmp_path: Path, kinds: dict[str, Kind], case: str = "qwen3 normalised") -> tuple[Path, Path]:
    """A GGUF file with matrices of some types, and one with the weights that they stand for in float32."""
    model = make_model(case, **SIZES, intermediate_size=256, moe_intermediate_size=256)
    folder = save(model, tmp_path / "model")
    file = write_gguf(folder, tmp_path / "m.gguf", lambda name: kinds.get(name.split(".")[-2], Kind.F32))
    return file, edited(file, {}, dequantises=True)


def test_quantised_experts(tmp_path: Path, rank_pool: Pools) -> None:
    kinds = {"ffn_gate_exps": Kind.Q8_0, "ffn_up_exps": Kind.Q4_0, "ffn_down_exps": Kind.MXFP4}
    file, twin = quantised(tmp_path, kinds)
    source, plain = (open_weights(path, read_model_config(path)) for path in (file, twin))
    formats = {
        "gate_proj": WeightFormat(Code.INT8, Scale.FLOAT16, 32),
        "up_proj": WeightFormat(Code.INT4, Scale.FLOAT16, 32),
        "down_proj": WeightFormat(Code.FP4, Scale.E8M0, 32),
    }
    shape, rows = (256, 256), slice(64, 192)
    for part, format in formats.items():
        name = f"model.layers.1.mlp.experts.3.{part}.weight"
        assert source.format_of(name) == format and plain.format_of(name) is None
        expected = plain.read(name, shape)
        assert torch.equal(source.read(name, shape), expected)
        assert torch.equal(source.read(name, shape, rows=rows), expected[rows])
        assert torch.equal(source.read_quantized(name, shape).dequantize(), expected)
        assert torch.equal(source.read_quantized(name, shape, rows=rows).dequantize(), expected[rows])
        assert len(source.read_quantized(name, shape, rows=slice(5, 5))) == 0
    assert source.format_of("model.layers.1.mlp.gate.weight") is None
    assert source.format_of("model.layers.1.self_attn.q_proj.weight") is None
    assert source.format_of("model.layers.9.mlp.gate.weight") is None
    for ours, theirs in zip(logits(rank_pool, file), logits(rank_pool, twin), strict=True):
        assert torch.equal(ours, theirs)


BLOCKS = [Kind.Q8_0, Kind.Q5_0, Kind.Q4_0, Kind.MXFP4, Kind.Q4_1, Kind.Q5_1]


@needs_native_kernels
@pytest.mark.parametrize(
    ("case", "kind"),
    # Mixtral's queries and keys have rows in pairs.
    [("qwen3 normalised", kind) for kind in (*BLOCKS, *K_QUANTS)] + [("mixtral", Kind.Q8_0), ("mixtral", Kind.Q4_K)],
)
def test_matrices_are_held_as_they_are_stored(case: str, kind: Kind, tmp_path: Path, rank_pool: Pools) -> None:
    names = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_q", "attn_k", "attn_v", "attn_output", "output")
    file, twin = quantised(tmp_path, dict.fromkeys(names, kind), case)
    name = FORMATS[kind.name].name
    assert read_model_config(file).formats == {"experts": name, "attention": name, "head": name}
    for ours, theirs in zip(logits(rank_pool, file), logits(rank_pool, twin), strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As llama.cpp's Q4_K_M: down projections and values of some layers, and the head, have more bits."""
    folder = tmp_path_factory.mktemp("mixture")
    model = make_model("qwen3 normalised", **SIZES, intermediate_size=256, moe_intermediate_size=256)
    wide = ("token_embd.weight", "output.weight", "blk.1.ffn_down_exps.weight", "blk.1.attn_v.weight")
    return write_gguf(
        save(model, folder / "model"),
        folder / "m.gguf",
        lambda name: Kind.F32 if "norm" in name else Kind.Q6_K if name in wide else Kind.Q4_K,
    )


@needs_native_kernels
def test_matrices_of_the_usual_mixture(mixture: Path, rank_pool: Pools) -> None:
    four, six = FORMATS["Q4_K"], FORMATS["Q6_K"]
    file, twin = mixture, edited(mixture, {}, dequantises=True)
    config = read_model_config(file)
    assert [layer.formats.experts for layer in config.layers] == [BlockFormats(four, four), BlockFormats(four, six)]
    assert [layer.formats.attention for layer in config.layers] == [BlockFormats(four, four), BlockFormats(None, four)]
    assert config.head_format == six
    for native in (False, True):
        first, second = (expert_bytes(config, "float32", native, layer) for layer in (0, 1))
        assert first == 3 * four.nbytes(256, 256, native) and second > first
    for ours, theirs in zip(logits(rank_pool, file), logits(rank_pool, twin), strict=True):
        assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4


@needs_native_kernels
@pytest.mark.parametrize("rows", [None, "int8"])
def test_tokens_of_the_usual_mixture_do_not_depend_on_ranks(mixture: Path, rows: str | None, rank_pool: Pools) -> None:
    """With equal bits, log-probabilities are equal, not close."""
    options = {"dtype": "bfloat16", "activation_quantization": rows, "is_quantized": True}
    wanted = answers(rank_pool, mixture, **options)
    chunks = {"dispatcher": "all_to_all", "max_num_batched_tokens": 9, "max_num_seqs": 4}
    for how in ({"dispatcher": "symmetric"}, chunks):
        assert answers(rank_pool, mixture, 2, **options, **how) == wanted


def test_damaged_factors_are_found(mixture: Path, tmp_path: Path) -> None:
    file, name = tmp_path / "damaged.gguf", "model.layers.1.mlp.experts.2.down_proj.weight"
    tensor = next(t for t in gguf.GGUFReader(mixture).tensors if t.name == "blk.1.ffn_down_exps.weight")
    content = bytearray(mixture.read_bytes())
    start = int(tensor.data_offset) + 3 * int(tensor.n_bytes) // tensor.data.shape[0] - 2  # the expert's last factor
    content[start : start + 2] = b"\x00\x7c"
    file.write_bytes(content)
    source = CheckedWeights(open_weights(file, read_model_config(file)))
    with pytest.raises(ValueError, match=rf"^model: tensor '{name}' is damaged: 1 of 256 factors read are NaN"):
        source.read_quantized(name, (256, 256))


def test_only_an_experts_bytes_are_read(tmp_path: Path) -> None:
    file, _ = quantised(tmp_path, {"ffn_gate_exps": Kind.Q8_0})
    source = open_weights(file, read_model_config(file))
    assert isinstance(source, GgufWeights)
    for part, nbytes in (("gate_proj", 256 * 8 * 34), ("down_proj", 256 * 256 * 4)):
        before = source.bytes_read
        source.read(f"model.layers.0.mlp.experts.2.{part}.weight", (256, 256))
        assert source.bytes_read - before == nbytes
        source.read(f"model.layers.0.mlp.experts.2.{part}.weight", (256, 256), rows=slice(8, 12))
        assert source.bytes_read - before == nbytes + nbytes // 64
