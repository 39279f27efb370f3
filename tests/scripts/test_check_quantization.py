"""Loss of quantised weights: its figures, the readers of whole texts, and the GGUF file that llama.cpp gets."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from places import SCRIPTS
from tiny_models import load, make_model, save

from moe_runtime.config.engine import EngineConfig

MODULES = ("check_quantization", "text_loss", "peers", "bench_model")
TOKENS = 41


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("check_quantization")
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]


def config(model: Path, **options: object) -> EngineConfig:
    return EngineConfig(str(model), device="cpu", dtype="float32", max_model_len=64, max_num_seqs=1, **options)


def texts(vocab: int = 97) -> list[list[int]]:
    return torch.randint(vocab, (2, TOKENS)).tolist()


def test_figures_are_those_of_their_definitions(check: ModuleType) -> None:
    expected_TV, found_TV = (torch.randn(TOKENS, 11).log_softmax(-1) for _ in range(2))
    tokens = texts(11)[0]
    loss = check.Loss.of(expected_TV, found_TV, tokens)
    divergence = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x) for x in (expected_TV, found_TV))
    )
    assert loss.divergence == pytest.approx(float(divergence.mean()), rel=1e-4)
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(expected_TV, found_TV, strict=True))
    assert loss.agreement == pytest.approx(same / TOKENS)
    likelihoods = [float(found_TV[i, token]) for i, token in enumerate(tokens[1:])]
    assert loss.perplexity == pytest.approx(math.exp(-sum(likelihoods) / (TOKENS - 1)), rel=1e-4)
    nothing = check.Loss.of(expected_TV, expected_TV, tokens)
    assert nothing.divergence == 0 and nothing.agreement == 1
    assert check.Loss.mean([loss, nothing]).divergence == pytest.approx(loss.divergence / 2)


def test_a_reader_gives_the_logits_of_one_text_after_the_other(check: ModuleType, tmp_path: Path) -> None:
    path = save(make_model("qwen3"), tmp_path)
    theirs, reader = load(path, torch.float32), check.Reader(config(path))
    for tokens in texts():
        with torch.inference_mode():
            expected_TV = theirs(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(reader.logits(tokens), expected_TV, atol=1e-3, rtol=1e-3)


def test_the_gguf_file_is_the_same_model(check: ModuleType, tmp_path: Path) -> None:
    model = make_model("glm4", tie_word_embeddings=True, first_k_dense_replace=0, routed_scaling_factor=1.7)
    path = save(model.bfloat16(), tmp_path / "plain")
    settings = json.loads((path / "config.json").read_text())
    settings |= {"rope_theta": 10000.0, "partial_rotary_factor": 0.5} | settings["rope_parameters"]
    check.write_gguf(settings, path / "model.safetensors", tmp_path / "model.gguf")
    plain, gguf = (check.Reader(config(file)) for file in (path, tmp_path / "model.gguf"))
    for tokens in texts():
        torch.testing.assert_close(gguf.logits(tokens), plain.logits(tokens), atol=1e-4, rtol=1e-4)


def test_a_row_shows_what_a_way_loses(check: ModuleType, tmp_path: Path) -> None:
    path = save(make_model("qwen3"), tmp_path)
    table = check.Table(check.Reader(config(path)).logits, {"a": texts(), "b": texts()})
    heading, _, plain = table.heading().splitlines()
    assert heading.endswith("| a | b |") and "| 0.0000 | 100.0% |" in plain
    divergence = {}
    for method in ("int8", "int4"):
        way = check.Way(method)
        reader = check.Reader(config(path, quantization=method))
        divergence[method] = float(table.row(way.cells, reader.logits).split("|")[4])
    assert 0 < divergence["int8"] < divergence["int4"]


def test_bytes_of_a_weight(check: ModuleType) -> None:
    assert [way.cells for way in check.WAYS[3:5]] == [
        ("`int4`, groups of 32", "float32", "0.562"),
        ("`int4`, groups of 32", "int8", "0.562"),
    ]
    assert [check.bytes_per_weight(format) for format in check.GGUF_FORMATS.values()] == ["2.000", "1.062", "0.562"]
