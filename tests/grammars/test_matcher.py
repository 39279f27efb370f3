"""The place of a sequence in its grammar: any walk gives a valid text, a replay gives the same place, limits hold."""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import jsonschema
import pytest
from grammar_walk import EOS, Walker
from hypothesis import given
from hypothesis import strategies as st
from places import SCRIPTS

from moe_runtime.grammars.matcher import Matcher
from moe_runtime.grammars.tokens import token_trie
from moe_runtime.types.structured_outputs import StructuredOutputs

sys.path.insert(0, str(SCRIPTS))
from structured.schemas import draw

WALKER = Walker(closers=['"'])
TRIE = token_trie(WALKER.vocabulary)


def test_walks_of_random_schemas_are_valid() -> None:
    rng, ended = random.Random(), 0
    for _ in range(150):
        schema = draw(rng)
        text = WALKER.output(StructuredOutputs(json=schema), rng)
        if text is not None:
            ended += 1
            jsonschema.validate(json.loads(text), schema)
    assert ended > 100


@given(st.integers(0, 2**32), st.integers(0, 60))
def test_a_replay_comes_to_the_same_place(seed: int, count: int) -> None:
    rng = random.Random(seed)
    grammar = WALKER.compiler.compile(StructuredOutputs(json=draw(rng)))
    matcher, output = Matcher(TRIE, grammar), list[int]()
    for _ in range(count):
        allowed = matcher.allowed()
        assert allowed is not None
        output.append(rng.choice(allowed.nonzero()[0].tolist()))
        matcher.accept(output[-1])
        if output[-1] == EOS:
            break
    replayed = Matcher(TRIE, grammar, output)
    first, second = matcher.allowed(), replayed.allowed()
    assert (first is None) == (second is None)
    assert first is None or second is None or (first == second).all()


def test_after_the_end_nothing_matters() -> None:
    matcher = Matcher(TRIE, WALKER.compiler.compile(StructuredOutputs(choice=["a"])))
    matcher.accept(ord("a"))
    allowed = matcher.allowed()
    assert allowed is not None and allowed.nonzero()[0].tolist() == [EOS]
    matcher.accept(EOS)
    for token in (5, EOS, 7):
        matcher.look_ahead()
        matcher.accept(token)
        assert matcher.error == ""


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    matcher = Matcher(TRIE, WALKER.compiler.compile(StructuredOutputs(choice=["a"])))
    matcher.accept(ord("b"))
    assert matcher.error


HOSTILE: list[dict[str, Any]] = [
    {"regex": "(((a{1,100}){1,100}){1,100}){1,100}"},
    {"regex": "(.*a){50}b{1000}"},
    {"regex": "(a|b|ab)*(c|d|cd){500}" * 20},
    {"regex": ".{0,100000}x"},
    {"json": {"type": "array", "minItems": 10**9}},
    {"json": {"type": "string", "pattern": "^(a+)+$", "maxLength": 10**8}},
    {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}},
    {"json": {"enum": [str(number) * 20 for number in range(3000)]}},
    {"grammar": "start: a\na: a a | b\nb: /x*/ b | /y/"},
    {"grammar": "start: " + "(" * 500 + '"a"' + ")" * 500},
]


@pytest.mark.parametrize("asked", HOSTILE, ids=str)
def test_hostile_grammars_are_refused_or_bounded(asked: dict[str, Any]) -> None:
    """A deadline a hundred times as long as the limits allow: it fails only if a limit is missing."""
    start = time.monotonic()
    try:
        matcher = Matcher(TRIE, WALKER.compiler.compile(StructuredOutputs(**asked)))
        for token in b"aaaaaaaa":
            matcher.look_ahead()
            matcher.accept(token)
            if matcher.error:
                break
    except ValueError as error:
        assert str(error).startswith("structured_outputs: ")
    assert time.monotonic() - start < 20
