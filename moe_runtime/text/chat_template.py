"""Renders a checkpoint's chat template, which is Jinja, in a sandbox that offers what transformers offers.

Templates come with the checkpoint, so they are not trusted: they see plain data only and cannot reach Python's objects.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment, Template

DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates, where a checkpoint has several
RESERVED = ("messages", "tools", "add_generation_prompt")
FINAL_MARK = "\ufdd1"  # ends the final message; a code point that Unicode keeps free for a program's own use


class ChatTemplate:
    """A checkpoint's chat templates.

    Args:
        source: a template, or several by name.
        variables: what templates see besides the conversation, such as `bos_token`.
    """

    def __init__(self, source: str | Mapping[str, str], variables: Mapping[str, Any]) -> None:
        self._sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self._variables = dict(variables)
        self._compiled: dict[str, Template] = {}

    def source(self, has_tools: bool = False) -> str:
        """The text of the template that is used with or without tools.

        Raises:
            ValueError: none of the names is "default".
        """
        name = TOOL_USE if has_tools and TOOL_USE in self._sources else DEFAULT
        if name not in self._sources:
            raise ValueError(
                f"chat_template: {', '.join(sorted(self._sources))} is not allowed; one must be named {DEFAULT!r}"
            )
        return self._sources[name]

    @property
    def tells_time(self) -> bool:
        """Whether a prompt may depend on when it is rendered."""
        return any("strftime_now" in source for source in self._sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: as the template takes them (see `chat_history`).
            add_generation_prompt: end with the beginning of the assistant's turn.
            continue_final_message: end within the last message, so that the model continues it.
            template_kwargs: further variables for the template, such as `enable_thinking`.

        Raises:
            ValueError: the template fails or refuses the conversation, or the arguments contradict each other.
        """
        variables = dict(template_kwargs or {})
        for name in RESERVED:
            if name in variables:
                raise ValueError(f"chat_template_kwargs: {name!r} is not allowed; it is an argument of its own")
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message: true is not allowed with add_generation_prompt; set one of them to false"
            )
        conversation = copy.deepcopy([dict(message) for message in messages])
        if continue_final_message:
            _mark_end(conversation)
        text = self._run(
            self.source(bool(tools)),
            {
                **self._variables,
                **variables,
                "messages": conversation,
                "tools": copy.deepcopy(list(tools)) if tools else None,
                "documents": variables.get("documents"),
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _up_to_mark(text) if continue_final_message else text

    def _run(self, source: str, variables: Mapping[str, Any]) -> str:
        try:
            if source not in self._compiled:
                self._compiled[source] = self._environment.from_string(source)
            return self._compiled[source].render(variables)
        except Exception as error:  # a template can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"messages: the chat template fails: {reason}") from error

    @cached_property
    def _environment(self) -> Environment:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import SandboxedEnvironment

        # The plain sandbox, not the immutable one: templates append to lists of their own (and to our copies).
        environment = SandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_block()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment


def _generation_block() -> type:
    """`{% generation %}` marks what the model wrote, for training. Here it has no effect."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)  # what is set within stays within, as in transformers

    return Generation


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes characters that HTML uses."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _mark_end(conversation: list[dict[str, Any]]) -> None:
    last = conversation[-1] if conversation else {}
    if last.get("tool_calls"):
        raise ValueError(
            "continue_final_message: true is not allowed if the last message has tool_calls; it must have content only"
        )
    content = last.get("content")
    if not isinstance(content, str):
        raise ValueError(f"continue_final_message: the last message's content is {content!r}; it must be a text")
    conversation[-1]["content"] = content + FINAL_MARK + " "  # the blank shows whether the template trims the text


def _up_to_mark(text: str) -> str:
    before, mark, after = text.rpartition(FINAL_MARK)
    if not mark:
        raise ValueError("continue_final_message: the chat template leaves the last message's content out")
    return before if after.startswith(" ") else before.rstrip()
