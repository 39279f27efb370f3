"""From what a request asks for to a grammar as text, which is checked before the request runs.

A grammar's text goes to the sequence's rank, which makes a `Matcher` of it. That takes about as long as a step, so
nothing else is compiled ahead or sent.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from moe_runtime.grammars.tokens import parser_limits, token_trie
from moe_runtime.types.structured_outputs import FIELDS, JSON_BLANKS, StructuredOutputs
from moe_runtime.types.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer

KEPT_CHARS = 2**22  # of grammars that were checked


class GrammarCompiler:
    """Makes grammars, and remembers those that were checked. Threads may share it.

    Args:
        read: returns the model's tokens. It is called for the first grammar.
    """

    def __init__(self, read: Callable[[], Vocabulary]) -> None:
        self._read = read
        self._checked: OrderedDict[StructuredOutputs, str] = OrderedDict()
        self._num_chars = 0
        self._lock = Lock()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens."""
        vocabulary = self._read()
        if not vocabulary.eos_ids:
            raise ValueError("structured_outputs: the model names no token that ends an output")
        return vocabulary

    @cached_property
    def _trie(self) -> LLTokenizer:
        return token_trie(self.vocabulary)

    def compile(self, asked: StructuredOutputs) -> str:
        """The grammar of a request, checked.

        Raises:
            ValueError: the schema, expression or grammar is wrong, too large, or asks for what cannot be done.
        """
        with self._lock:
            if (found := self._checked.get(asked)) is not None:
                self._checked.move_to_end(asked)
                return found
        grammar = grammar_text(asked)
        self._check(asked, grammar)
        with self._lock:
            if asked not in self._checked:
                self._checked[asked] = grammar
                self._num_chars += len(grammar)
            while self._num_chars > KEPT_CHARS:
                self._num_chars -= len(self._checked.popitem(last=False)[1])
        return grammar

    def _check(self, asked: StructuredOutputs, grammar: str) -> None:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._trie, grammar, log_level=0, limits=parser_limits())
        error = matcher.get_error()
        if not error and not any(matcher.compute_bitmask()):
            error = matcher.get_error() or "no output matches"
        if error:
            raise ValueError(f"structured_outputs: {_field(asked)} is not allowed: {_line(error)}")


def grammar_text(asked: StructuredOutputs) -> str:
    """The grammar of a request in llguidance's form. Raises ValueError if it has no such form."""
    answer = _answer_grammar(asked)
    if asked.within:
        return json.dumps({"grammars": [{"lark_grammar": asked.within}, {**answer, "name": "answer"}]})
    return json.dumps({"grammars": [answer]})


def _answer_grammar(asked: StructuredOutputs) -> dict[str, Any]:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if asked.choice:
        return {"lark_grammar": "start: " + " | ".join(json.dumps(text) for text in asked.choice)}
    if asked.regex is not None:
        return _first_grammar(LLMatcher.grammar_from_regex(asked.regex))
    if asked.grammar is not None:
        try:
            return {"lark_grammar": any_to_lark(asked.grammar)}
        except Exception as error:  # the converter raises whatever its parts raise
            raise ValueError(f"structured_outputs: grammar is not allowed: {_line(str(error))}") from error
    schema = '{"type": "object"}' if asked.json_object else str(asked.json)
    try:
        return _first_grammar(
            LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_BLANKS, "lenient": False})
        )
    except ValueError as error:
        raise ValueError(f"structured_outputs: json is not allowed: {_line(str(error))}") from error


def _first_grammar(text: str) -> dict[str, Any]:
    grammar: dict[str, Any] = json.loads(text)["grammars"][0]
    return grammar


def _field(asked: StructuredOutputs) -> str:
    return next(name for name in FIELDS if getattr(asked, name))


def _line(error: str) -> str:
    return " ".join(error.split())[:300]
