"""Turns a user's prompt and parameters into a request: checks the prompt and tokenizes it. No torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_runtime.engine.request import Request
from moe_runtime.text.detokenizer import IncrementalDecoder, OutputText
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer


class Intake:
    """Makes requests.

    Args:
        tokenizer: None accepts and returns token ids only.
        vocab_size: of the model.
        max_model_len: maximum length of prompt plus output.
        seed: seeds the generator that draws a seed for each request without one.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._seeds = random.Random(seed)

    def request(self, request_id: str, seq_id: int, prompt: str | list[int], params: SamplingParams) -> Request:
        """Make a request.

        Raises:
            ValueError: the request cannot be served; the message says why.
        """
        if params.stop and self._tokenizer is None:
            raise ValueError("stop: stop strings need a tokenizer; use stop_token_ids with skip_tokenizer_init")
        token_ids = self._token_ids(prompt)
        room = self._max_model_len - len(token_ids)
        return Request(
            request_id=request_id,
            seq_id=seq_id,
            prompt=prompt if isinstance(prompt, str) else None,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
            max_output_tokens=min(room, params.max_tokens or room),
            output_text=self._output_text(token_ids, params),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )

    def _token_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("prompt: text needs a tokenizer; give token ids with skip_tokenizer_init")
            token_ids = self._tokenizer.encode(prompt)
        else:
            token_ids = list(prompt)
        if not token_ids:
            raise ValueError("prompt: it is empty; at least one token is needed")
        vocab_size = self._vocab_size
        for token in token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ValueError(
                    f"prompt: token id {token!r} is not allowed; it must be an integer from 0 to {vocab_size - 1}"
                )
        if len(token_ids) >= self._max_model_len:
            raise ValueError(
                f"prompt: {len(token_ids)} tokens, but max_model_len is {self._max_model_len} "
                "and at least one must be left for the output"
            )
        return token_ids

    def _output_text(self, prompt: Sequence[int], params: SamplingParams) -> OutputText | None:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return None
        skip = params.skip_special_tokens

        def decode(token_ids: list[int]) -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=skip)

        decoder = IncrementalDecoder(decode, prompt, tokenizer.special_ids if skip else frozenset())
        return OutputText(decoder, tuple(params.stop), params.include_stop_str_in_output)
