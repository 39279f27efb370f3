"""What is checked of a tokenizer: ids, round trips, streams, stop strings, bytes, offsets and time."""

from __future__ import annotations

import random
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moe_runtime.serve.openai.logprobs import TextLogprobs, TokenTexts
from moe_runtime.text.detokenizer import REPLACEMENT, IncrementalDecoder, OutputText
from moe_runtime.text.tokenizer import Tokenizer
from moe_runtime.types.outputs import Logprob
from tokenizer_check.sources import Reference
from tokenizer_check.texts import LONG, TEXTS

NUM_RANDOM = 300  # sequences of random ids
MAX_RATIO = 10  # of the times of 1 MB and 1/4 MB; 4 is linear, 16 is quadratic
MAX_SECONDS = 60  # for 1 MB


@dataclass(frozen=True)
class Subject:
    """A tokenizer under test.

    Attributes:
        theirs: the same directory loaded by transformers.
        reference: the tokenizer's own library, if there is one: from text to ids, without special tokens.
    """

    ours: Tokenizer
    theirs: Any
    reference: Reference | None
    random: random.Random

    def encode(self, text: str) -> list[int]:
        return self.ours.encode(text, add_special_tokens=False)


def check_ids(subject: Subject) -> None:
    """Ids are those of transformers and of the tokenizer's own library."""
    plain = [text for text in TEXTS if not any(token in text for token in subject.ours.added_tokens)]
    for text in [*TEXTS, LONG]:
        for special in (False, True):
            expected = subject.theirs.encode(text, add_special_tokens=special)
            bos = subject.theirs.bos_token_id
            if special and bos is not None and expected[:2] == [bos, bos]:  # the text has one of its own
                del expected[0]
            same(subject.ours.encode(text, add_special_tokens=special), expected, text)
    for text in plain if subject.reference else ():
        same(subject.encode(text), subject.reference(text), text)


def check_round_trips(subject: Subject) -> None:
    """Decoded ids are the text, normalised or not, and what transformers decodes."""
    for text in [*TEXTS, LONG]:
        ids = subject.encode(text)
        for skip in (False, True):
            theirs = subject.theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            same(subject.ours.decode(ids, skip), theirs, text)
            if not any(token in text for token in subject.ours.added_tokens if token.strip(" ▁")):
                # SentencePiece writes a space as "▁", so it cannot tell the two apart.
                normal = (text, unicodedata.normalize("NFC", text), text.replace("▁", " "))
                assert theirs in normal, f"{text!r} becomes {theirs!r}"


def check_streams(subject: Subject) -> None:
    """Tokens one by one give the text of all of them, with and without special tokens, behind any prompt."""
    for context, ids in sequences(subject):
        for skip in (False, True):
            whole = subject.ours.decode([*context, *ids], skip)
            before = subject.ours.decode(context, skip)
            decoder = make_decoder(subject, context, skip)
            pieces = [decoder.append(token) for token in ids]
            streamed = "".join(pieces) + decoder.flush()
            if not whole.startswith(before):  # the output completes a character
                before = before.removesuffix(REPLACEMENT)
            same(before + streamed, whole, ids)


def check_stops(subject: Subject) -> None:
    """A stop string ends the text where it is in the text of all tokens, in whatever parts it is released."""
    for text in TEXTS + [LONG] * 10:
        ids = subject.encode(text)
        whole = "".join(make_pieces(subject, ids))
        if not whole:
            continue
        begin = subject.random.randrange(len(whole))
        stop = whole[begin : begin + subject.random.randint(1, 6)]
        output = OutputText(make_decoder(subject, [], skip=False), [stop], include_stop=False)
        released = ""
        for index, token in enumerate(ids):
            found = output.append(token, last=index == len(ids) - 1)
            if found or subject.random.random() < 0.5:
                released += output.release(found is not None)
            assert whole.startswith(released), f"{released!r} was taken back"
            if found:
                break
        same(released + output.release(True), whole[: whole.index(stop)], (text, stop))


def check_bytes(subject: Subject) -> None:
    """The bytes of tokens add up to the text, and offsets of log-probabilities point at each token's text."""
    ours = subject.ours
    for text in [*TEXTS, LONG]:
        prompt, ids = subject.encode("a"), subject.encode("a" + text)
        if ids[: len(prompt)] != prompt:  # the text joins with the letter before it
            continue
        ids = ids[len(prompt) :]
        whole = ours.decode([*prompt, *ids], skip_special_tokens=False).removeprefix("a")
        data = [ours.token_bytes(token) for token in ids]
        same(b"".join(data).decode(errors="replace"), whole, text)
        assert max(map(len, data), default=0) <= ours.max_token_bytes
        logprobs: Any = [{token: Logprob(-1.0, 1, None)} for token in ids]
        part = TextLogprobs(TokenTexts(ours, hides_special=False)).part(ids, logprobs)
        for token_text, begin in zip(part["tokens"], part["text_offset"], strict=True):
            if not token_text.startswith(REPLACEMENT):
                known = token_text.removesuffix(REPLACEMENT)
                same(known, whole[begin:][: len(known)], text)


def check_time(subject: Subject) -> None:
    """The time for a text grows with its length."""
    seconds = []
    for size in (250_000, 1_000_000):
        text = (LONG * (size // len(LONG.encode()) + 1)).encode()[:size].decode(errors="ignore")
        start = time.perf_counter()
        subject.ours.encode(text)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < MAX_RATIO * seconds[0] and seconds[1] < MAX_SECONDS, f"1/4 MB and 1 MB take {seconds} s"


CHECKS = {
    "ids": check_ids,
    "round trips": check_round_trips,
    "streams": check_streams,
    "stops": check_stops,
    "bytes": check_bytes,
    "time": check_time,
}


def same(found: object, expected: object, of: object) -> None:
    assert found == expected, f"{of!r}: {found!r} is not {expected!r}"


def make_decoder(subject: Subject, context: list[int], skip: bool) -> IncrementalDecoder:
    """As `engine/intake.py` makes it."""
    hidden = subject.ours.special_ids if skip else frozenset()
    return IncrementalDecoder(lambda ids: subject.ours.decode(ids, skip_special_tokens=False), context, hidden)


def make_pieces(subject: Subject, ids: list[int]) -> list[str]:
    decoder = make_decoder(subject, [], skip=False)
    return [decoder.append(token) for token in ids] + [decoder.flush()]


def sequences(subject: Subject) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and outputs: real text cut anywhere, random ids, bytes of characters that are cut and mixed."""
    for text in [*TEXTS, LONG]:
        ids = subject.encode(text)
        cut = subject.random.randrange(len(ids) + 1)
        yield [], ids
        yield ids[:cut], ids[cut:]
    broken = [token for text in TEXTS for token in subject.encode(text) if "\ufffd" in subject.ours.token_text(token)]
    special = sorted(subject.ours.special_ids)
    clean = subject.encode("a.")
    for _ in range(NUM_RANDOM):
        pool = [range(subject.ours.vocab_size + 3), broken or clean, clean, special or clean]
        ids = [subject.random.choice(subject.random.choice(pool)) for _ in range(subject.random.randint(1, 60))]
        cut = subject.random.randrange(len(ids))
        yield [*ids[:cut], clean[-1]], ids[cut:]
