"""Prompts that wait together are tokenised together and remembered; work is counted, not timed."""

from __future__ import annotations

import asyncio
import random
import string
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from fakes import save_byte_tokenizer, save_metaspace_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from serve_clients import DEFAULTS, client_of, run, started
from serve_fakes import FakeEngine, FakeTokenizer

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve import prompts
from moe_runtime.serve.prompt_cache import ENTRY_BYTES, PromptCache, prompt_key
from moe_runtime.serve.prompts import Source, Tokenising
from moe_runtime.text.chat_template import ChatTemplate
from moe_runtime.text.tokenizer import RenderedPrompt


class BatchTokenizer(FakeTokenizer):
    """Keeps the batches that it gets; the first waits for `begin`. A text with "poison" breaks its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.begin = threading.Event()

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        self.batches.append(texts)
        assert self.begin.wait(20)
        if any("poison" in text for text in texts):
            raise RuntimeError("the tokenizer has broken")
        return super().encode_batch(texts, add_special_tokens)


def source(text: str, *, key: bytes | None = None, special: bool = True, num_chars: int | None = None) -> Source:
    def make(gone: threading.Event) -> str:
        if "wrong" in text:
            raise ValueError(f"prompt: {text} is not allowed")
        return text

    return Source(make, len(text) if num_chars is None else num_chars, special, key)


def tokenise(tokenizer: BatchTokenizer, sources: list[Source]) -> list[Any]:
    """Two prompts occupy the threads; then all `sources` wait. Their outcomes, prompts or errors."""

    async def scenario() -> list[Any]:
        tokenising = Tokenising()
        first = []
        for number in range(2):
            first.append(asyncio.create_task(tokenising.prompt(tokenizer, source("first"))))
            while len(tokenizer.batches) <= number:
                await asyncio.sleep(0.001)
        rest = [asyncio.create_task(tokenising.prompt(tokenizer, each)) for each in sources]
        await asyncio.sleep(0)
        tokenizer.begin.set()
        await asyncio.gather(*first)
        return await asyncio.gather(*rest, return_exceptions=True)

    found = run(scenario())
    del tokenizer.batches[:2]
    return found


def test_prompts_that_wait_go_together() -> None:
    tokenizer = BatchTokenizer()
    texts = [" ".join("x" * random.randint(1, 9) for _ in range(random.randint(1, 9))) for _ in range(20)]
    found = tokenise(tokenizer, [source(text) for text in texts])
    assert found == [RenderedPrompt(text, [len(word) for word in text.split()]) for text in texts]
    assert sorted(text for batch in tokenizer.batches for text in batch) == sorted(texts)
    assert len(tokenizer.batches) <= 2


def test_a_batch_is_bounded_and_long_prompts_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_BATCH", 3)
    tokenizer = BatchTokenizer()
    tokenise(tokenizer, [source(f"a{i}") for i in range(7)] + [source("long", num_chars=prompts.PIECE_CHARS + 1)] * 2)
    assert max(map(len, tokenizer.batches)) == 3
    assert tokenizer.batches.count(["long"]) == 2


def test_an_error_of_one_is_no_error_of_another() -> None:
    tokenizer = BatchTokenizer()
    found = tokenise(tokenizer, [source(text) for text in ("aa", "wrong", "poison", "bbb")])
    assert [found[0], found[3]] == [RenderedPrompt("aa", [2]), RenderedPrompt("bbb", [3])]
    assert str(found[1]) == "prompt: wrong is not allowed" and isinstance(found[2], RuntimeError)


def test_texts_with_and_without_special_tokens_are_kept_apart() -> None:
    tokenizer = BatchTokenizer()
    tokenise(tokenizer, [source(f"{flag}", special=flag) for flag in (True, False, True, False)])
    assert all(len(set(batch)) == 1 for batch in tokenizer.batches)


def test_a_client_that_goes_leaves_the_others() -> None:
    tokenizer = BatchTokenizer()

    async def scenario() -> Any:
        tokenising = Tokenising()
        leaving = asyncio.create_task(tokenising.prompt(tokenizer, source("leaving")))
        while not tokenizer.batches:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(tokenising.prompt(tokenizer, source("aa")))
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        tokenizer.begin.set()
        return await waiting

    assert run(scenario()) == RenderedPrompt("aa", [2])


@pytest.mark.parametrize("save", [save_byte_tokenizer, save_metaspace_tokenizer])
@given(data=st.data())
def test_a_batch_is_tokenised_as_its_texts(tmp_path_factory: Any, save: Any, data: st.DataObject) -> None:
    if save not in TOKENIZERS:
        TOKENIZERS[save] = save(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = TOKENIZERS[save]
    texts = data.draw(st.lists(st.text() | st.sampled_from(["<|user|>", "<s>", "<s> a"]), min_size=1, max_size=5))
    special = data.draw(st.booleans())
    try:
        wanted = [tokenizer.encode(text, special) for text in texts]
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)):
            tokenizer.encode_batch(texts, special)
    else:
        assert tokenizer.encode_batch(texts, special) == wanted


TOKENIZERS: dict[Any, Any] = {}


class CacheMachine(RuleBasedStateMachine):
    """A cache of at most 4 prompts and 4,000 bytes, against a slow one."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PromptCache(4, 4000)
        self.model: OrderedDict[bytes, RenderedPrompt] = OrderedDict()

    def bytes_of(self, prompt: RenderedPrompt) -> int:
        return ENTRY_BYTES + prompt.text.__sizeof__() + 4 * len(prompt.token_ids)

    @rule(number=st.integers(0, 7), length=st.sampled_from([0, 1, 5, 200, 700, 990]))
    def put(self, number: int, length: int) -> None:
        prompt = RenderedPrompt("x" * number, [2**32 - 1 - number] * length)
        self.cache.put(bytes([number]), prompt)
        if self.bytes_of(prompt) <= 4000:
            self.model.pop(bytes([number]), None)
            self.model[bytes([number])] = prompt
            while len(self.model) > 4 or sum(map(self.bytes_of, self.model.values())) > 4000:
                self.model.popitem(last=False)

    @rule(number=st.integers(0, 7))
    def get(self, number: int) -> None:
        found = self.cache.get(bytes([number]))
        assert found == self.model.get(bytes([number]))
        if found is not None:
            self.model.move_to_end(bytes([number]))
            found.token_ids.append(0)  # the list belongs to the caller

    @invariant()
    def holds_its_bounds(self) -> None:
        assert len(self.cache) == len(self.model) <= 4
        assert self.cache.num_bytes == sum(map(self.bytes_of, self.model.values())) <= 4000


test_cache = CacheMachine.TestCase


def requests_of(
    bodies: list[tuple[str, dict[str, Any], dict[str, str]]],
    tokenizer: FakeTokenizer,
    config: ServerConfig = DEFAULTS,
) -> list[Any]:
    async def scenario() -> list[Any]:
        async with started(FakeEngine(tokenizer=tokenizer)) as engine, client_of(engine, config) as client:
            return [await client.post(path, json=body, headers=headers) for path, body, headers in bodies]

    return run(scenario())


class Template(ChatTemplate):
    def __init__(self, source: str) -> None:
        super().__init__(source, {})


@pytest.mark.parametrize(("template", "num_rendered"), [("{{ messages }}", 2), ("{{ strftime_now('%d') }}", 4)])
def test_a_chat_is_rendered_once_for_each_key_unless_its_template_tells_the_time(
    template: str, num_rendered: int, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("one\nother")
    one, other = ({"Authorization": f"Bearer {key}"} for key in ("one", "other"))
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = Template(template)  # type: ignore[assignment]
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    answers = requests_of(
        [
            ("/v1/chat/completions", chat, one),
            ("/v1/chat/completions", chat | {"seed": 3}, one),
            ("/v1/chat/completions", chat, other),
            ("/generate", chat, one),
        ],
        tokenizer,
        ServerConfig(api_key_file=str(tmp_path / "keys")),
    )
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(tokenizer.rendered) == num_rendered


def test_keys_tell_prompts_apart() -> None:
    words = ["".join(random.choices(string.ascii_letters, k=3)) for _ in range(3)]
    parts = [("", "text", words[0], True), ("", "text", words[0], False), (words[1], "text", words[0], True)]
    parts += [("", "chat", {"messages": [{"role": "user", "content": word}]}) for word in ("", *words)]
    assert len({prompt_key(*each) for each in parts}) == len(set(map(repr, parts)))
