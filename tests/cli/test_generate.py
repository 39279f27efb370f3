import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
from command_lines import flags
from serve_fakes import FakeEngine

from moe_runtime.balancer.load import ExpertLoad
from moe_runtime.cli import main as cli
from moe_runtime.config.engine import EngineConfig
from moe_runtime.types.sampling_params import SamplingParams

SAMPLING_FLAGS = {
    "min_tokens": 3,
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 4,
    "min_p": 0.1,
    "repetition_penalty": 1.5,
    "presence_penalty": -1.0,
    "frequency_penalty": 1.0,
    "seed": 3,
    "stop": ["a, b", "c"],
    "stop_token_ids": [4, 5],
    "ignore_eos": True,
    "logprobs": 1,
    "prompt_logprobs": 0,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "routing": "fast",
    "return_routed_experts": True,
    "priority": -2,
    "timeout": 7.5,
}


def test_every_sampling_option_is_a_flag(built, capsys):
    assert set(SAMPLING_FLAGS) == {field.name for field in fields(SamplingParams)} - {
        "n",
        "logit_bias",
        "structured_outputs",
    }
    assert cli.main(["generate", "here", "--prompt", "hi", *flags(SAMPLING_FLAGS)]) == 0
    (engine,) = built
    assert engine.added[0][2] == SamplingParams(**SAMPLING_FLAGS)
    assert engine.config == EngineConfig("here", seed=3, routing="fast")
    assert engine.closed


def test_sampling_options_in_a_file(built, tmp_path):
    file = tmp_path / "generate.yaml"
    file.write_text("stop: [x, y]\ntop-k: 2\nseed: 9\n")
    assert cli.main(["generate", "here", "--config", str(file), "--prompt", "hi"]) == 0
    assert built[0].added[0][2] == SamplingParams(stop=["x", "y"], top_k=2, seed=9, max_tokens=256)
    assert built[0].config.seed == 9


def test_flags_that_are_not_given_are_the_models(monkeypatch):
    model = SimpleNamespace(default_sampling={"temperature": 0.25, "top_k": 7, "max_tokens": 3})
    engine = FakeEngine(model_config=model)
    monkeypatch.setattr("moe_runtime.build.build_engine", lambda config: engine)
    assert cli.main(["generate", "here", "--prompt", "hi", "--temperature", "0.5"]) == 0
    assert engine.added[0][2] == SamplingParams(temperature=0.5, top_k=7, max_tokens=3)


def test_generate_one_prompt(built, capsys):
    assert cli.main(["generate", "--prompt", "hello sea", "--max-tokens", "3", "here"]) == 0
    captured = capsys.readouterr()
    assert captured.out == " 4 5 6\n"
    assert captured.err.startswith("1 prompt tokens, 3 generated in ")
    assert captured.err.count("\n") == 1 and captured.err.endswith(" tok/s)\n")


@pytest.mark.parametrize(("form", "tokens"), [([], [4, 5, 3]), (["--chat"], [4, 5, 3]), (["--raw"], [5, 3])])
def test_a_prompt_is_a_message_unless_it_is_raw(built, form, tokens):
    assert cli.main(["generate", "here", "--prompt", "hello sea", *form]) == 0
    assert built[0].added[0][1] == tokens


def test_a_model_without_a_chat_template_continues_prompts(built, monkeypatch):
    monkeypatch.setattr("serve_fakes.FakeTokenizer.has_chat_template", False)
    assert cli.main(["generate", "here", "--prompt", "hello sea"]) == 0
    assert built[0].added[0][1] == [5, 3]


def test_generate_several_prompts(built, capsys):
    words = ["--prompt", "a bb", "--prompt-token-ids", "1,2", "--prompt", "ccc", "--raw", "--max-tokens", "2"]
    assert cli.main(["generate", "here", *words]) == 0
    assert capsys.readouterr().out == ">>> a bb\n 3 4\n\n>>> ccc\n 4 5\n\n>>> 1,2\n 3 4\n\n"


def test_generate_without_a_tokenizer(built, capsys):
    words = ["--skip-tokenizer-init", "--prompt-token-ids", "7", "--max-tokens", "3"]
    assert cli.main(["generate", "here", *words]) == 0
    assert capsys.readouterr().out == "8,9,10\n"


def test_logprobs_are_printed(built, capsys):
    words = ["--prompt-token-ids", "8", "--max-tokens", "2", "--logprobs", "1", "--prompt-logprobs", "0"]
    assert cli.main(["generate", "here", *words]) == 0
    assert capsys.readouterr().out.splitlines() == [
        " 9 10",
        "output ' 9':-3.0000#3 | ' 110':-1.0000#1",
        "output ' 10':-3.0000#3 | ' 111':-1.0000#1",
    ]


def test_text_comes_as_it_is_made_on_a_terminal(built, capsys, monkeypatch):
    seen = []
    step = FakeEngine.step
    monkeypatch.setattr(FakeEngine, "step", lambda self: seen.append(capsys.readouterr().out) or step(self))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["generate", "here", "--prompt", "a", "--raw", "--max-tokens", "3"]) == 0
    assert [*seen, capsys.readouterr().out] == ["", " 2", " 3", " 4\n"]


def test_generate_writes_a_heatmap(built, tmp_path):
    path = tmp_path / "load.json"
    assert cli.main(["generate", "here", "--prompt", "a", "--heatmap", str(path)]) == 0
    assert ExpertLoad.load(path) == FakeEngine().expert_load()
