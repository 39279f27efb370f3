"""Turns a user's prompt and parameters into a request. No torch."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_runtime.engine.prefix_cache import KeyMaker
from moe_runtime.engine.request import Request
from moe_runtime.engine.request_rules import RequestRules
from moe_runtime.grammars.compile import GrammarCompiler
from moe_runtime.text.detokenizer import IncrementalDecoder, OutputText
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.types.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer


class Intake:
    """Makes requests.

    Args:
        tokenizer: None accepts and returns token ids only.
        rules: what requests must obey.
        seed: seeds the generator that draws a seed for each request without one.
        key_maker: makes the keys of requests' pages; None if no prefixes are cached.
        compiler: makes grammars; None without a tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        rules: RequestRules,
        seed: int,
        key_maker: KeyMaker | None = None,
        compiler: GrammarCompiler | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._key_maker = key_maker
        self._compiler = compiler
        self._seeds = random.Random(seed)

    def request(
        self,
        request_id: str,
        seq_id: int,
        prompt: str | list[int],
        params: SamplingParams,
        arrived_at: float,
        user: str = "",
        shown_ids: Set[int] = frozenset(),
        cache_salt: str | None = None,
    ) -> Request:
        """Make a request.

        Args:
            arrived_at: the time from which its deadlines count.
            user: who takes a turn with it when requests wait.
            shown_ids: special tokens that stay in the text in spite of `skip_special_tokens`.
            cache_salt: the request shares pages only with requests of the same salt.

        Raises:
            ValueError: the request cannot be served; the message says why.
        """
        assert params.n == 1, "each continuation is a request"
        token_ids = self.token_ids(prompt)
        takes_default_routing = params.routing is None
        policy = self._rules.check(token_ids, params)
        grammar = "" if params.structured_outputs is None else self._grammar(params.structured_outputs)
        params = replace(params, routing=policy, structured_outputs=None)
        room = self._rules.max_model_len - len(token_ids)
        maker = self._key_maker
        return Request(
            request_id=request_id,
            seq_id=seq_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
            # The prompt of a request for no tokens runs as that of a request for one.
            max_output_tokens=max(1, room if params.max_tokens is None else min(room, params.max_tokens)),
            user=user,
            arrived_at=arrived_at,
            takes_default_routing=takes_default_routing,
            output_text=self._output_text(token_ids, params, shown_ids),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            page_keys=None if maker is None else maker.keys(len(token_ids), policy, cache_salt),
            grammar=grammar,
        )

    def _grammar(self, asked: StructuredOutputs) -> str:
        if self._compiler is None:
            raise ValueError("structured_outputs: a tokenizer is needed; skip_tokenizer_init is set, so there is none")
        return self._compiler.compile(asked)

    def token_ids(self, prompt: str | list[int]) -> list[int]:
        """A prompt's token ids. Raises ValueError as `request`."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise ValueError("prompt: text needs a tokenizer; give token ids with skip_tokenizer_init")
        return self._tokenizer.encode(prompt)

    def _output_text(self, prompt: Sequence[int], params: SamplingParams, shown_ids: Set[int]) -> OutputText | None:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return None

        def decode(token_ids: list[int]) -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=False)

        hidden = tokenizer.special_ids - shown_ids if params.skip_special_tokens else frozenset()
        decoder = IncrementalDecoder(decode, prompt, hidden)
        return OutputText(decoder, tuple(params.stop), params.include_stop_str_in_output)
