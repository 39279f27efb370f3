"""A model whose weights hold NaN: its requests end with an error that says so, never with JSON that is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from fakes import save_byte_tokenizer
from serve_clients import ServerThread, events_of
from tiny_models import make_model, save

from moe_runtime import LLM, SamplingParams
from moe_runtime.build import build_engine
from moe_runtime.cli import main as cli
from moe_runtime.config.engine import EngineConfig

MESSAGE = "the model's logits after token 3 are NaN or infinite; its weights may be damaged"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a prompt with token 9 sees the damage."""
    folder = tmp_path_factory.mktemp("damaged")
    tokenizer = save_byte_tokenizer(folder)
    model = make_model("qwen3", vocab_size=tokenizer.vocab_size + len(tokenizer.special_ids), eos_token_id=0)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def url(damaged: Path) -> Iterator[str]:
    config = EngineConfig(str(damaged), dtype="float32", device="cpu", max_model_len=64)
    with ServerThread(lambda: build_engine(config)) as server:
        yield server.url


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"temperature": 0}, {"echo": True, "logprobs": 1}])
def test_whole_and_streamed(url: str, options: dict[str, object]) -> None:
    body = {"prompt": [8, 9, 10], "max_tokens": 4, **options}
    response = httpx.post(url + "/v1/completions", json=body)
    assert response.status_code == 500
    assert (response.json()["error"]["message"], response.json()["error"]["type"]) == (MESSAGE, "server_error")
    text = httpx.post(url + "/v1/completions", json={**body, "stream": True}).text
    (event,) = events_of(text)
    assert event["error"]["message"] == MESSAGE
    json.loads(json.dumps(event, allow_nan=False))


def test_others_in_the_batch_go_on(damaged: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    with LLM(str(damaged), dtype="float32", device="cpu", max_model_len=64) as llm:
        prompts = [{"prompt_token_ids": ids} for ids in ([5, 6], [8, 9, 10], [7])]
        good, bad, other = (output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False))
        alone = [llm.generate(prompts[i], params, use_tqdm=False)[0].outputs[0] for i in (0, 2)]
    assert (bad.finish_reason, bad.error, bad.token_ids) == ("error", MESSAGE, [])
    assert [good.token_ids, other.token_ids] == [output.token_ids for output in alone]


def test_the_command_says_so_and_fails(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "float32", "--device", "cpu", "--max-model-len", "64", "--min-tokens", "20"]
    assert cli.main(["generate", str(damaged), "--prompt-token-ids", "8,9,10", *options]) == 1
    assert f"moe-runtime: error: {MESSAGE}\n" in capsys.readouterr().err
