"""Turns clients' prompts into token ids. Long texts take time, so this runs outside of the event loop, and is bounded.

Prompts that wait at the same time are tokenised together. The last ones are kept for when they come again. A text that
cannot fit the context is refused before it is tokenised. The work ends when its client goes.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from moe_runtime.engine.request_rules import RequestRules
from moe_runtime.serve.prompt_cache import PromptCache, prompt_key
from moe_runtime.text.tokenizer import RenderedPrompt
from moe_runtime.types.sampling_params import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer

T = TypeVar("T")
MAX_THREADS = 2  # that tokenise at the same time
MAX_BATCH = 32  # prompts tokenised together
PIECE_CHARS = 2**16  # tokenised between two looks at whether the client is still there; longer prompts go alone
LONG = 8  # characters per token of context above which a text is counted in pieces first
BORDER_TOKENS = 8  # more tokens than this cannot come from cutting a text once


class ClientGoneError(Exception):
    """The work was given up, as its client has gone."""


@dataclass(frozen=True)
class Source:
    """A prompt to tokenise.

    Attributes:
        make: checks and renders it, in a thread; gets an event that is set when the client has gone. Returns the text
            to tokenise, or the prompt if it needs ways of its own. Raises ValueError if it cannot be served.
        num_chars: about how long it is.
        add_special_tokens: as for `Tokenizer.encode`.
        key: the same for prompts with the same tokens; None if the prompt is not to be remembered.
    """

    make: Callable[[threading.Event], str | RenderedPrompt]
    num_chars: int
    add_special_tokens: bool
    key: bytes | None


@dataclass(frozen=True, eq=False)
class _Job:
    source: Source
    done: asyncio.Future[RenderedPrompt]
    gone: threading.Event = field(default_factory=threading.Event)


class Tokenising:
    """Runs tokenising in threads, a few at a time."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MAX_THREADS)
        self._cache = PromptCache()
        self._waiting: deque[_Job] = deque()
        self._workers: set[asyncio.Task[None]] = set()

    async def run(self, work: Callable[[threading.Event], T]) -> T:
        """The result of `work`, which gets an event that is set when the caller is cancelled."""
        async with self._slots:
            gone = threading.Event()
            try:
                return await asyncio.to_thread(work, gone)
            finally:
                gone.set()

    async def prompt(self, tokenizer: Tokenizer, source: Source) -> RenderedPrompt:
        """The text and tokens of a prompt.

        Raises:
            ValueError: it cannot be served.
        """
        if source.key is not None and (found := self._cache.get(source.key)) is not None:
            return found
        job = _Job(source, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if len(self._workers) < MAX_THREADS:
            worker = asyncio.create_task(self._work(tokenizer))
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        try:
            prompt = await job.done
        finally:
            job.gone.set()
        if source.key is not None:
            self._cache.put(source.key, prompt)
        return prompt

    async def _work(self, tokenizer: Tokenizer) -> None:
        """Tokenise what waits, all of it together, until nothing waits."""
        async with self._slots:
            while self._waiting:
                jobs = self._next_batch()
                for job, outcome in zip(jobs, await _outcomes(tokenizer, jobs), strict=True):
                    if job.done.done():  # cancelled
                        continue
                    if isinstance(outcome, BaseException):
                        job.done.set_exception(outcome)
                    else:
                        job.done.set_result(outcome)

    def _next_batch(self) -> list[_Job]:
        jobs = [self._waiting.popleft()]
        num_chars = jobs[0].source.num_chars
        while self._waiting and len(jobs) < MAX_BATCH:
            num_chars += self._waiting[0].source.num_chars
            if num_chars > PIECE_CHARS:
                break
            jobs.append(self._waiting.popleft())
        return jobs


async def _outcomes(tokenizer: Tokenizer, jobs: list[_Job]) -> list[RenderedPrompt | BaseException]:
    """What each job has come to. An error of one is no error of another."""
    (found,) = await asyncio.gather(asyncio.to_thread(_tokenise, tokenizer, jobs), return_exceptions=True)
    if not isinstance(found, BaseException):
        return found
    if len(jobs) == 1:
        return [found]
    return [outcome for job in jobs for outcome in await _outcomes(tokenizer, [job])]


def _tokenise(tokenizer: Tokenizer, jobs: list[_Job]) -> list[RenderedPrompt | BaseException]:
    made = [_make(job) for job in jobs]
    outcomes: dict[int, RenderedPrompt] = {}
    for add_special_tokens in (False, True):
        texts = {
            place: text
            for place, (text, job) in enumerate(zip(made, jobs, strict=True))
            if isinstance(text, str) and job.source.add_special_tokens is add_special_tokens
        }
        if texts:
            encoded = tokenizer.encode_batch(list(texts.values()), add_special_tokens)
            outcomes |= zip(texts, map(RenderedPrompt, texts.values(), encoded), strict=True)
    return [outcomes[place] if isinstance(each, str) else each for place, each in enumerate(made)]


def _make(job: _Job) -> str | RenderedPrompt | BaseException:
    try:
        if job.gone.is_set():
            raise ClientGoneError
        return job.source.make(job.gone)
    except (ValueError, ClientGoneError) as error:
        return error


def require_tokenizer(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    """Raise ValueError if there is no tokenizer."""
    if tokenizer is None:
        raise ValueError(f"{field}: text is not allowed, as this server has no tokenizer; send token ids")
    return tokenizer


def text_source(
    tokenizer: Tokenizer,
    text: str,
    rules: RequestRules,
    params: SamplingParams,
    owner: str,
    add_special_tokens: bool = True,
) -> Source:
    """A text as a prompt. It is refused if it cannot fit the context."""

    def make(gone: threading.Event) -> str:
        check_size(tokenizer, [text], rules, params, gone)
        return text

    key = prompt_key(owner, "text", text, add_special_tokens) if len(text) <= PIECE_CHARS else None
    return Source(make, len(text), add_special_tokens, key)


def check_size(
    tokenizer: Tokenizer, texts: Sequence[str], rules: RequestRules, params: SamplingParams, gone: threading.Event
) -> None:
    """Check that texts may fit the context. Texts that are much longer than most are tokenised in pieces for that.

    Raises:
        ValueError: they cannot fit.
        ClientGoneError: `gone` was set.
    """
    num_chars = sum(map(len, texts))
    rules.check_length(num_chars // tokenizer.max_token_bytes, params, at_least=True)
    if num_chars <= LONG * rules.max_model_len:
        return
    least = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            if gone.is_set():
                raise ClientGoneError
            piece = tokenizer.encode(text[start : start + PIECE_CHARS], add_special_tokens=False)
            least += max(0, len(piece) - BORDER_TOKENS)
            rules.check_length(least, params, at_least=True)
