"""A server on a socket over a real engine with a tiny model and a real tokenizer, and the model's own outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fakes import save_byte_tokenizer
from serve_clients import ServerThread
from tiny_models import make_model, save

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.text.tokenizer import Tokenizer

MAX_MODEL_LEN = 90


@dataclass(frozen=True)
class RealServer:
    url: str
    model: Any
    tokenizer: Tokenizer

    def exact_logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """transformers' log-probabilities `[T, V]` of the token after each token."""
        with torch.no_grad():
            return self.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """transformers' most likely tokens, one after the other, continuing after the end of sequence."""
        token_ids = list(prompt)
        for _ in range(count):
            token_ids.append(int(self.exact_logprobs(token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]


def start_real_server(folder: Path) -> tuple[ServerThread, RealServer]:
    """The server as a context manager, and its `RealServer`."""
    tokenizer = save_byte_tokenizer(folder)
    model = make_model("qwen3", vocab_size=tokenizer.vocab_size + len(tokenizer.special_ids), eos_token_id=0)
    save(model, folder)
    config = EngineConfig(
        str(folder),
        dtype="float32",
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        served_model_name="tiny",
    )
    server = ServerThread(lambda: build_engine(config))
    return server, RealServer(server.url, model, tokenizer)
