from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import MockExecutor, model_config, save_byte_tokenizer

from moe_runtime import build
from moe_runtime.config.engine import EngineConfig
from moe_runtime.models import registry as models
from moe_runtime.weights import checkpoint as weights


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    """A folder that is taken for a checkpoint with four experts and a context of 64 tokens; it has a tokenizer."""
    save_byte_tokenizer(tmp_path)
    monkeypatch.setattr(weights, "resolve_model", Path)
    monkeypatch.setattr(models, "read_stored_config", lambda path: model_config())
    return tmp_path


class Recorder:
    """Makes mock executors and remembers what it was asked for."""

    def __init__(self, num_pages: int = 64) -> None:
        self.num_pages = num_pages

    def __call__(self, config, model, path) -> MockExecutor:
        self.config, self.path = config, path
        self.executor = MockExecutor(config, [self.num_pages] * config.ep_size)
        return self.executor


def test_everything_is_put_together(checkpoint):
    make_executor = Recorder()
    engine = build.build_engine(EngineConfig(str(checkpoint), ep_size=2), make_executor)
    assert engine.executor is make_executor.executor
    assert (make_executor.path, make_executor.config.ep_size) == (checkpoint, 2)
    assert make_executor.config.max_model_len == engine.max_model_len == 64, "ranks and front agree on the context"
    assert engine.tokenizer.encode("The sea") == save_byte_tokenizer(checkpoint).encode("The sea")


def test_the_tokenizer_may_be_left_out_or_lie_elsewhere(checkpoint, tmp_path_factory):
    config = EngineConfig(str(checkpoint), skip_tokenizer_init=True)
    assert build.build_engine(config, Recorder()).tokenizer is None
    other = tmp_path_factory.mktemp("other")
    save_byte_tokenizer(other, chat_template=None)
    engine = build.build_engine(
        dataclasses.replace(config, skip_tokenizer_init=False, tokenizer=str(other)), Recorder()
    )
    assert not engine.tokenizer.has_chat_template


def test_outputs_also_end_at_the_tokenizers_own_end(checkpoint, monkeypatch, caplog):
    """The configuration may name another token, or none; so it is for any tokenizer that is asked for."""
    end = save_byte_tokenizer(checkpoint).encode("<|end|>")[0]
    for told in ((), (7,), (end,), (7, end)):
        config = dataclasses.replace(model_config(), eos_token_ids=told)
        monkeypatch.setattr(models, "read_stored_config", lambda path, config=config: config)
        engine = build.build_engine(EngineConfig(str(checkpoint)), Recorder())
        assert set(engine.model_config.eos_token_ids) == {*told, end}
        assert len(engine.model_config.eos_token_ids) == len({*told, end})
        engine = build.build_engine(EngineConfig(str(checkpoint), skip_tokenizer_init=True), Recorder())
        assert engine.model_config.eos_token_ids == told, "no tokenizer, no token of its own"


def test_sampling_parameters_of_the_model_are_taken_if_asked_for(checkpoint):
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "do_sample": False}))
    engine = build.build_engine(EngineConfig(str(checkpoint)), Recorder())
    expected = {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    assert engine.model_config.default_sampling == engine.health()["default_sampling"] == expected
    file.write_text(json.dumps({"temperature": "warm"}))
    with pytest.raises(ValueError, match=r"^temperature: 'warm' is not allowed.*generation_config=none"):
        build.build_engine(EngineConfig(str(checkpoint)), Recorder())
    engine = build.build_engine(EngineConfig(str(checkpoint), generation_config="none"), Recorder())
    assert engine.model_config.default_sampling == engine.health()["default_sampling"] == {}


BAD = [
    ({"ep_size": 5}, r"^ep_size: 5 is not allowed; it must be at most 4, the model's experts$"),
    ({"max_model_len": 65}, r"^max_model_len: 65 is not allowed; it must be at most 64, the model's context$"),
    ({"dispatcher": "all_to_all"}, r"^dispatcher: 'all_to_all' is not allowed with one rank"),
    ({"tokenizer": "/nowhere"}, r"^tokenizer: '/nowhere' has none that can be loaded"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_does_not_fit_the_model_is_refused_before_ranks_start(checkpoint, options, message):
    def never(*args):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        build.build_engine(EngineConfig(str(checkpoint), **options), never)


def test_ranks_end_if_the_engine_cannot_be_made(checkpoint):
    make_executor = Recorder(num_pages=3)
    with pytest.raises(AssertionError, match="one sequence always fits"):
        build.build_engine(EngineConfig(str(checkpoint), ep_size=2), make_executor)
    assert make_executor.executor.closed == 1


@pytest.mark.parametrize(
    ("ep_size", "kind"), [(1, "in_process.InProcessExecutor"), (2, "process_executor.ProcessExecutor")]
)
def test_one_rank_runs_in_this_process_and_several_in_their_own(checkpoint, monkeypatch, ep_size, kind):
    module, name = kind.split(".")
    make_executor = Recorder()
    monkeypatch.setitem(sys.modules, f"moe_runtime.cluster.{module}", SimpleNamespace(**{name: make_executor}))
    assert build.build_engine(EngineConfig(str(checkpoint), ep_size=ep_size)).executor is make_executor.executor


def test_importing_is_light():
    """The package alone imports no third party; the API neither torch nor what only servers need."""
    code = (
        "import sys; import moe_runtime; assert moe_runtime.__version__; "
        "third = {'torch', 'numpy', 'transformers', 'zmq', 'msgspec', 'fastapi', 'pydantic', 'uvicorn', 'tqdm'}; "
        "assert not third & set(sys.modules), third & set(sys.modules); "
        "moe_runtime.SamplingParams, moe_runtime.LLM; "
        "assert not third & set(sys.modules), third & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names():
    import moe_runtime

    assert dir(moe_runtime) == moe_runtime.__all__ == ["LLM", "SamplingParams", "__version__"]
    from moe_runtime.llm import LLM
    from moe_runtime.types.sampling_params import SamplingParams

    assert moe_runtime.LLM is LLM and moe_runtime.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = moe_runtime.Engine
