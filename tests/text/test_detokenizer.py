from __future__ import annotations

import random

import pytest
from fakes import TEXTS, save_byte_tokenizer, save_metaspace_tokenizer, save_unigram_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.text.detokenizer import CONTEXT_TOKENS, MAX_WINDOW, IncrementalDecoder, OutputText, StopMatcher
from moe_runtime.text.tokenizer import Tokenizer

SAVE = {"byte": save_byte_tokenizer, "metaspace": save_metaspace_tokenizer, "unigram": save_unigram_tokenizer}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVE.items()}


def make_decoder(tokenizer: Tokenizer, context: list[int], skip_special: bool = True) -> IncrementalDecoder:
    return IncrementalDecoder(
        lambda token_ids: tokenizer.decode(token_ids, skip_special),
        context,
        tokenizer.special_ids if skip_special else frozenset(),
    )


def pieces_of(decoder: IncrementalDecoder, token_ids: list[int]) -> list[str]:
    return [decoder.append(token_id) for token_id in token_ids] + [decoder.flush()]


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize("prompt", ["", "The sea is", "naïve", "the end of the story, 你好"])
@pytest.mark.parametrize("text", [*TEXTS, " calm tonight", "🙂🚀 the end", "  two  spaces "])
def test_pieces_add_up_to_the_text_behind_the_prompt(tokenizers, name, prompt, text):
    tokenizer = tokenizers[name]
    prompt_ids = tokenizer.encode(prompt)
    token_ids = tokenizer.encode(prompt + text)[len(prompt_ids) :]
    whole = tokenizer.decode(prompt_ids + token_ids)
    pieces = pieces_of(make_decoder(tokenizer, prompt_ids), token_ids)
    assert "".join(pieces) == whole.removeprefix(tokenizer.decode(prompt_ids))
    assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


def test_a_character_is_split_over_tokens(tokenizers):
    tokenizer = tokenizers["byte"]
    token_ids = tokenizer.encode("🦀🦀")
    assert len(token_ids) > 2
    pieces = pieces_of(make_decoder(tokenizer, []), token_ids)
    assert [piece for piece in pieces if piece] == ["🦀", "🦀"]


def test_spaces_between_words_survive(tokenizers):
    tokenizer = tokenizers["metaspace"]
    prompt_ids, token_ids = tokenizer.encode("The sea"), tokenizer.encode("The sea is calm")
    pieces = pieces_of(make_decoder(tokenizer, prompt_ids), token_ids[len(prompt_ids) :])
    assert "".join(pieces) == " is calm"
    assert tokenizer.decode(token_ids[len(prompt_ids) :]) == "is calm", "decoded alone, the space is lost"


def test_a_prompt_that_ends_in_half_a_character_is_continued_with_all_of_it(tokenizers):
    tokenizer = tokenizers["byte"]
    token_ids = tokenizer.encode("a🦀b")
    prompt_ids = token_ids[:2]
    assert tokenizer.decode(prompt_ids).endswith("\ufffd")
    assert "".join(pieces_of(make_decoder(tokenizer, prompt_ids), token_ids[2:])) == "🦀b"


@pytest.mark.parametrize("name", SAVE)
def test_a_prompt_that_ends_in_a_replacement_character_is_continued_without_it(tokenizers, name):
    """It looks like half a character, and is a whole one."""
    tokenizer = tokenizers[name]
    prompt_ids, token_ids = tokenizer.encode("a \ufffd"), tokenizer.encode("a \ufffd 0")
    pieces = pieces_of(make_decoder(tokenizer, prompt_ids), token_ids[len(prompt_ids) :])
    assert "".join(pieces) == " 0"


@pytest.mark.parametrize("name", SAVE)
def test_a_prompt_that_ends_in_long_characters_is_continued_with_more(tokenizers, name):
    tokenizer = tokenizers[name]
    prompt_ids = tokenizer.encode("🦀🦑🦀🦑")
    token_ids = tokenizer.encode("🦀🦑🦀🦑🦑🦀")[len(prompt_ids) :]
    assert "".join(pieces_of(make_decoder(tokenizer, prompt_ids), token_ids)) == "🦑🦀"


@pytest.mark.parametrize("name", SAVE)
def test_special_tokens_are_hidden_or_shown(tokenizers, name):
    tokenizer = tokenizers[name]
    end = tokenizer.encode("<|end|>")[-1]
    prompt_ids = tokenizer.encode("The sea")
    token_ids = [end, *tokenizer.encode("The sea is")[len(prompt_ids) :], end, end]
    assert "".join(pieces_of(make_decoder(tokenizer, prompt_ids), token_ids)) == " is"
    shown = "".join(pieces_of(make_decoder(tokenizer, prompt_ids, skip_special=False), token_ids))
    assert shown.count("<|end|>") == 3


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize("count", [1, 6, 9, 30])
def test_a_prompt_that_ends_in_hidden_tokens_is_continued_with_a_space(tokenizers, name, count):
    tokenizer = tokenizers[name]
    end = tokenizer.encode("<|end|>")[-1]
    assert_pieces_add_up(tokenizer, [*tokenizer.encode("a"), *[end] * count], tokenizer.encode("a 0")[1:])
    assert_pieces_add_up(tokenizer, [end] * count, tokenizer.encode("a 0"))


def assert_pieces_add_up(tokenizer: Tokenizer, context: list[int], token_ids: list[int]) -> None:
    pieces = pieces_of(make_decoder(tokenizer, context), token_ids)
    assert tokenizer.decode(context) + "".join(pieces) == tokenizer.decode(context + token_ids)


@pytest.mark.parametrize("name", SAVE)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_tokens_give_in_pieces_what_they_give_together(tokenizers, name, data):
    tokenizer = tokenizers[name]
    tokens = st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.just(tokenizer.encode("a🦀")[-4]), max_size=12)
    clean_end = tokenizer.encode("a.")[-1]  # so that the prompt's bytes do not join with the output's
    assert_pieces_add_up(tokenizer, [*data.draw(tokens), clean_end], [*data.draw(tokens), tokenizer.vocab_size])


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_text_gives_in_pieces_what_it_gives_together(tokenizers, data):
    tokenizer = tokenizers["metaspace"]
    words = st.sampled_from([" ", " sea", " 0", "🦀"])
    texts = st.lists(st.text(max_size=5) | words | st.integers(1, 12).map("<|end|>".__mul__), max_size=8)
    context, token_ids = ([token for text in data.draw(texts) for token in tokenizer.encode(text)] for _ in range(2))
    assert_pieces_add_up(tokenizer, [*tokenizer.encode("a"), *context], token_ids)


def cut(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, found character by character."""
    for end in range(1, len(text) + 1):
        ending = [candidate for candidate in stop if text[:end].endswith(candidate)]
        if ending:
            longest = max(ending, key=len)
            return (text[:end] if include else text[: end - len(longest)]), longest
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=10),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3, unique=True),
    include=st.booleans(),
)
def test_stop_strings_over_token_borders(pieces, stop, include):
    """What is released is never taken back, and adds up to the text before the first stop string."""
    expected, expected_stop = cut("".join(pieces), stop, include)
    decoder = IncrementalDecoder(lambda token_ids: "".join(pieces[token_id] for token_id in token_ids), [])
    output = OutputText(decoder, stop, include)
    released, found = "", None
    for index in range(len(pieces)):
        found = output.append(index, last=index == len(pieces) - 1)
        is_last = found is not None or index == len(pieces) - 1
        released += output.release(is_last)
        assert expected.startswith(released), "text was shown that the stop string takes back"
        if is_last:
            break
        if include:
            assert released == "".join(pieces[: index + 1]), "there is no need to withhold"
        candidates = [len(text) for text in stop] or [1]
        assert len("".join(pieces[: index + 1])) - len(released) < max(candidates), "more is withheld than need be"
    assert (released, found) == (expected, expected_stop)


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize("prompt", ["", "The sea", "🦀"])
def test_bytes_that_are_no_text_flow(tokenizers, name, prompt):
    """A model that says one lone byte for ever: text comes with every token, and the work for a token does not grow."""
    tokenizer = tokenizers[name]
    lone = tokenizer.encode("a🦀")[-1]
    assert tokenizer.token_bytes(lone) == b"\x80"
    sizes = []

    def decode(token_ids: list[int]) -> str:
        sizes.append(len(token_ids))
        return tokenizer.decode(token_ids)

    decoder = IncrementalDecoder(decode, tokenizer.encode(prompt))
    pieces = [decoder.append(lone) for _ in range(500)]
    assert all(pieces[4:]), "text is held back"
    assert "".join(pieces) + decoder.flush() == "\ufffd" * 500
    assert sum(sizes) < 30 * 500 and max(sizes) <= 20


@pytest.mark.parametrize("name", SAVE)
@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.binary(max_size=6) | st.sampled_from("aé🦀€▁\ufffd").map(str.encode), max_size=30))
def test_any_bytes_give_their_text(tokenizers, name, parts):
    """A byte that is no text changes no character before it: the tokenizers library's fallback would take them back."""
    tokenizer = tokenizers[name]
    data = b"".join(parts)
    of_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    context, token_ids = tokenizer.encode("."), [of_byte[bytes([byte])] for byte in data]
    pieces = pieces_of(make_decoder(tokenizer, context), token_ids)
    assert "".join(pieces) == data.decode(errors="replace")
    assert tokenizer.decode(context + token_ids) == "." + data.decode(errors="replace")


@pytest.mark.parametrize("name", SAVE)
def test_a_stop_string_within_characters_of_several_tokens(tokenizers, name):
    tokenizer = tokenizers[name]
    output = OutputText(make_decoder(tokenizer, tokenizer.encode("a")), ["🦑🦀"], include_stop=False)
    token_ids = tokenizer.encode("a🦀🦑🦀x")[len(tokenizer.encode("a")) :]
    released, found = "", None
    while found is None:
        found = output.append(token_ids.pop(0), last=False)
        released += output.release(found is not None)
    assert (released, found, tokenizer.decode(token_ids)) == ("🦀", "🦑🦀", "x")


@settings(deadline=None, max_examples=200)
@given(st.text("ab", min_size=1, max_size=6), st.lists(st.text("ab", max_size=5), max_size=8))
def test_a_matcher_knows_how_much_of_its_stop_string_there_is(stop, pieces):
    matcher, text = StopMatcher(stop), ""
    for piece in pieces:
        end = matcher.append(piece)
        found = (text + piece).find(stop)
        assert end == (None if found < 0 else found + len(stop) - len(text))
        if end is not None:
            return
        text += piece
        assert matcher.num_matched == max(n for n in range(len(stop)) if text.endswith(stop[:n]))


def test_a_stop_string_may_not_begin_before_the_least_number_of_tokens():
    output = OutputText(IncrementalDecoder(lambda ids: "".join("abcab"[i] for i in ids), []), ["ab"], False)
    found = [output.append(i, last=i == 4, may_stop=i >= 1) for i in range(5)]
    assert found == [None, None, None, None, "ab"] and output.release(finished=True) == "abc"


def test_a_stop_string_within_a_real_tokenizers_text(tokenizers):
    for name, tokenizer in tokenizers.items():
        token_ids = tokenizer.encode(TEXTS[0])
        for _ in range(20):
            start = random.randrange(len(TEXTS[0]) - 3)
            stop = TEXTS[0][start : start + random.randint(1, 9)]
            output = OutputText(make_decoder(tokenizer, []), [stop], include_stop=False)
            released = ""
            for token_id in token_ids:
                found = output.append(token_id, last=token_id == token_ids[-1])
                released += output.release(found is not None)
                if found:
                    break
            assert (name, released, found) == (name, TEXTS[0][: TEXTS[0].index(stop)], stop)


def test_text_held_for_half_a_character_is_searched_when_no_token_follows(tokenizers):
    tokenizer = tokenizers["byte"]
    crab = tokenizer.encode("🦀")
    output = OutputText(make_decoder(tokenizer, []), ["\ufffd"], include_stop=False)
    assert output.append(tokenizer.encode("a")[0], last=False) is None
    assert output.append(crab[0], last=False) is None
    assert output.append(None, last=True) == "\ufffd"
    assert output.release(finished=True) == "a"


@pytest.mark.parametrize("name", SAVE)
def test_the_work_for_a_token_does_not_grow_with_the_output(tokenizers, name):
    tokenizer, num_decoded = tokenizers[name], 0

    def decode(token_ids: list[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return tokenizer.decode(token_ids)

    output = OutputText(IncrementalDecoder(decode, tokenizer.encode(TEXTS[0])), ("never said",), False)
    token_ids = random.choices(range(tokenizer.vocab_size), k=4000)
    counts, texts = [], []
    for token_id in token_ids:
        num_decoded = 0
        output.append(token_id, last=False)
        texts.append(output.release(False))
        counts.append(num_decoded)
    assert max(counts) <= 2 * MAX_WINDOW + 4 * CONTEXT_TOKENS, "with the window's beginning looked for"
    assert sum(counts[2000:]) < 1.2 * sum(counts[:2000])
    assert sum(map(len, texts)) > 2000
