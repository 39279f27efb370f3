"""The Python API. See `LLM`."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.types.outputs import Completion, RequestOutput, request_output
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.balancer.live.mover import Rebalance
    from moe_runtime.balancer.load import ExpertLoad
    from moe_runtime.balancer.placement import Placement

REBALANCE_POLL_SECONDS = 0.001

Prompt = str | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A model, its tokenizer and its ranks, for offline use. Belongs to one thread at a time.

    With `ep_size=1` the model runs in this process. With more ranks, each rank is a process of its own. The ranks end
    with `close()`, with the `with` block, or when the object is garbage-collected.

    Args:
        model: a local Hugging Face directory, a GGUF file, a hub id, or "demo".
        options: fields of `EngineConfig`. `decode_slowdown` is infinite unless given: nobody waits for a single token.

    Raises:
        ValueError: an option or the model cannot be used; the message says why.
        RankError: a rank failed to start.

    Example:
        >>> llm = LLM("demo", ep_size=2)
        >>> llm.generate("The sea is", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        options = {"model": os.fspath(model), "decode_slowdown": math.inf, **options}
        self._engine = build_engine(EngineConfig.from_dict(options))
        self._finalizer = weakref.finalize(self, self._engine.close)
        self._request_ids = map(str, itertools.count())
        self._failure = ""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts, all in one batch.

        Args:
            prompts: one or more, each a text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`. A mapping may also
                have a "cache_salt": prompts share cached prefixes only with prompts of the same salt.
            sampling_params: one for all prompts, or one for each. None uses what the model's generation_config.json
                recommends (unless `generation_config` is "none"), and the defaults of `SamplingParams` for the rest.
                An object is taken as it is.
            use_tqdm: show progress on stderr.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt or its parameters cannot be served. No prompt has run.
            RuntimeError: the LLM is closed, or a rank has failed.
        """
        self._require_alive()
        if isinstance(prompts, (str, Mapping)):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts: {prompts!r} is not allowed; it must be a prompt or a list of them")
        plain, salts = zip(*map(_plain_prompt, prompts), strict=True) if prompts else ((), ())
        return self._run(plain, sampling_params, use_tqdm, salts)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one or more conversations. Each is a list of messages with a "role" and a "content".

        Raises:
            ValueError: as `generate`; also if there is no chat template, or if it refuses the messages.
            RuntimeError: as `generate`.
        """
        self._require_alive()
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise ValueError("messages: a chat needs a tokenizer; skip_tokenizer_init is set, so there is none")
        conversations: Sequence[Any] = [messages]
        if isinstance(messages, Sequence) and messages and all(isinstance(entry, (list, tuple)) for entry in messages):
            conversations = messages
        prompts: list[str | list[int]] = [
            tokenizer.apply_chat_template(messages).token_ids for messages in conversations
        ]
        return self._run(prompts, sampling_params, use_tqdm)

    def expert_load(self) -> ExpertLoad:
        """Tokens per MoE layer and expert since the start, counted separately for prefill and decode."""
        self._require_alive()
        with self._guard():
            return self._engine.expert_load()

    def placement(self) -> Placement:
        """Which expert sits on which rank."""
        return self._engine.placement()

    def rebalance(self, dry_run: bool = False) -> Rebalance:
        """Plan a better placement for the recent load and, unless `dry_run`, move experts there now.

        Returns the moves, and the balancedness before and after. This changes no tokens.

        Raises:
            ValueError: with one rank there is nothing to balance.
        """
        self._require_alive()
        refusal: ValueError | None = None
        with self._guard():
            try:
                rebalance = self._engine.rebalance(dry_run)
                while not rebalance.done:
                    self._engine.tend()
                    time.sleep(REBALANCE_POLL_SECONDS)
                return rebalance
            except ValueError as error:  # refused before anything changed
                refusal = error
        raise refusal

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Returns True, as vLLM does for success."""
        self._require_alive()
        self._engine.reset_prefix_cache()
        return True

    def close(self) -> None:
        """End the ranks and free the model. May be called twice."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_alive(self) -> None:
        if self._failure:
            raise RuntimeError(f"this LLM has failed and is closed: {self._failure}")
        if not self._finalizer.alive:
            raise RuntimeError("this LLM is closed")

    def _run(
        self,
        prompts: Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        cache_salts: Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = SamplingParams(**self._engine.model_config.default_sampling)  # type: ignore[arg-type]
        params = _params_per_prompt(sampling_params, len(prompts))
        request_ids = list(itertools.islice(self._request_ids, len(prompts)))
        choices = {
            request_id: [f"{request_id}-{index}" for index in range(params[row].n)]
            for row, request_id in enumerate(request_ids)
        }
        completions = {choice: Completion() for ids in choices.values() for choice in ids}
        try:
            for row, ids in enumerate(choices.values()):
                try:
                    prompt = self._engine.token_ids(prompts[row])
                    for index, choice in enumerate(ids):
                        salt = None if cache_salts is None else cache_salts[row]
                        self._engine.add_request(choice, prompt, params[row].choice(index), cache_salt=salt)
                except ValueError as error:
                    raise ValueError(f"prompts[{row}]: {error}" if len(prompts) > 1 else str(error)) from error
            self._finish(completions, use_tqdm)
        finally:
            for choice in completions:  # left by an error or Ctrl-C; the engine ignores finished ones
                self._engine.abort(choice)
        return [
            request_output(request_id, prompt if isinstance(prompt, str) else None, [completions[each] for each in ids])
            for (request_id, ids), prompt in zip(choices.items(), prompts, strict=True)
        ]

    def _finish(self, completions: dict[str, Completion], use_tqdm: bool) -> None:
        """Step until all requests have ended."""
        from tqdm import tqdm

        num_tokens = num_finished = 0
        with tqdm(total=len(completions), unit="prompt", desc="generating", disable=not use_tqdm) as bar:
            while num_finished < len(completions):
                with self._guard():
                    deltas = self._engine.step()
                for delta in deltas:
                    if delta.request_id not in completions:  # aborted by an earlier call
                        continue
                    completions[delta.request_id].add(delta)
                    num_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        num_finished += 1
                        bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                        bar.update()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Wraps all communication with the ranks: an error inside makes this LLM unusable."""
        with _interrupt_afterwards():
            try:
                yield
            except BaseException as error:  # ranks and front may now be at different steps
                self._failure = str(error) or type(error).__name__
                self.close()
                raise


@contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended; a second Ctrl-C interrupts the block.

    An engine that is interrupted within a step is lost; between steps it can continue.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt


def _plain_prompt(prompt: object) -> tuple[str | list[int], str | None]:
    """A prompt's text or token ids, and its salt."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping) and len(prompt.keys() - {"cache_salt"}) == 1:
        salt = prompt.get("cache_salt")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise ValueError(f"cache_salt: {salt!r} is not allowed; it must be a non-empty string")
        if isinstance(text := prompt.get("prompt"), str):
            return text, salt
        if isinstance(token_ids := prompt.get("prompt_token_ids"), Sequence) and not isinstance(token_ids, str):
            return list(token_ids), salt
    raise ValueError(
        f'prompt: {prompt!r} is not allowed; it must be a text, {{"prompt": text}} or {{"prompt_token_ids": [...]}}'
    )


def _params_per_prompt(params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(entry, SamplingParams) for entry in params):
        raise ValueError(f"sampling_params: {params!r} is not allowed; it must be SamplingParams or a list of them")
    if len(params) != num_prompts:
        raise ValueError(f"sampling_params: {len(params)} given for {num_prompts} prompts; give one, or one for each")
    return params
