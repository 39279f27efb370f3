"""Compares prompts of chats with those of transformers' `apply_chat_template`."""

from __future__ import annotations

import copy
import json
from typing import Any

from jinja2 import TemplateError

from tokenizer_check.checks import Subject, same
from tokenizer_check.texts import CONVERSATIONS, TOOLS

OPTIONS: tuple[dict[str, bool], ...] = (
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
)


def check_template(subject: Subject) -> str:
    """Every conversation gives a text of transformers, and its ids. Conversations that the template refuses count not.

    The runtime changes what a template cannot take (docs/tools.md): arguments as texts are compared as well, and
    conversations with calls are left out where the template has none.
    """
    template = subject.ours.chat_template
    if template is None:
        return "no template"
    rendered = 0
    for name, messages in CONVERSATIONS.items():
        for tools in (None, TOOLS):
            if "call" in name and "tool_calls" not in template.source(bool(tools)):
                continue
            for options in OPTIONS:
                theirs = _theirs(subject, messages, tools, options)
                if theirs:
                    _compare(subject, messages, tools, options, theirs)
                    rendered += 1
    assert rendered >= 12, f"only {rendered} conversations were rendered"
    return f"{rendered} chats"


def _compare(subject: Subject, messages: Any, tools: Any, options: dict[str, bool], theirs: list[str]) -> None:
    prompt = subject.ours.apply_chat_template(messages, tools=tools, **options)
    assert prompt.text in theirs, f"{options}: {prompt.text!r} is none of {theirs}"
    same(prompt.token_ids, subject.theirs.encode(prompt.text, add_special_tokens=False), options)
    bos = subject.theirs.bos_token_id
    if bos is not None and prompt.token_ids[0] == bos:
        assert prompt.token_ids[1] != bos, "the beginning of sequence comes twice"
        same(subject.ours.encode(prompt.text), prompt.token_ids, options)


def _theirs(subject: Subject, messages: Any, tools: Any, options: dict[str, bool]) -> list[str]:
    """What transformers renders, with the arguments of calls as objects and as texts."""
    texts = []
    for as_text in (False, True):
        history = copy.deepcopy(messages)
        for call in [call for message in history for call in message.get("tool_calls", ()) if as_text]:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        try:
            texts.append(subject.theirs.apply_chat_template(history, tools=tools, tokenize=False, **options))
        except (TemplateError, TypeError, ValueError):  # it refuses the conversation
            continue
    return texts
