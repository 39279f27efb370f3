"""Turns a conversation of OpenAI's form into what a chat template can render.

Templates differ in what they bear: arguments as text, content None, ids of another form, calls at all. Each rule here
follows from the template's text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_runtime.text.formats.ids import numbered_id, short_id

Message = Mapping[str, Any]

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
MAX_SHOWN = 200  # characters of a value in an error
# The template adds arguments to a text as they are: `+ tool['function']['arguments']`, without a filter after it.
ADDED_ARGUMENTS = re.compile(r"""\+\s*[\w.\[\]'"]*arguments['"]?+\]?+(?!\w|\s*\|)""")
# The template tells None from a content, and does not take an empty text for the same.
NONE_CONTENT = re.compile(r"""content(?:['"]\])?\s+is\s+(?:not\s+)?none(?!\s+or\s+\S*content['"\]]*\s*==\s*['"]{2})""")
THINKS_OR_SPEAKS = "message.content and message.thinking"  # gpt-oss: one of both beside a call


def template_messages(messages: object, template: str) -> list[dict[str, Any]]:
    """Messages as a template takes them. The arguments of calls are objects with the client's order of keys.

    Args:
        messages: of OpenAI's form: a role, a content of text, text parts or None, calls, results.
        template: the text of the template that renders them.

    Raises:
        ValueError: a message has another form; the error names it.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages: {_shown(messages)} is not allowed; it must be a list with at least one message")
    history = [_plain(message, f"messages.{index}", template) for index, message in enumerate(messages)]
    _give_ids(history)
    _name_results(history)
    _order_results(history)
    if "[TOOL_CALLS]" in template:
        _shorten_ids(history)
    if "<|tool_calls_section_begin|>" in template:
        _number_ids(history)
    if "tool_calls" not in template:
        for message in history:
            _calls_into_content(message, template)
    if THINKS_OR_SPEAKS in template:
        for message in history:
            _content_into_thinking(message)
    return history


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def count_calls(messages: Sequence[Message]) -> int:
    """Number of tool calls in a conversation."""
    return sum(len(message.get("tool_calls") or ()) for message in messages)


def _plain(message: Any, where: str, template: str) -> dict[str, Any]:
    """A copy of a message: content as text, arguments as objects, reasoning under each of its names."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'{where}: {_shown(message)} is not allowed; it must have "role" and "content" texts')
    plain = {key: value for key, value in message.items() if value is not None}
    calls = _plain_calls(plain.pop("tool_calls", None), where, template)
    if calls:
        plain["tool_calls"] = calls
    if plain["role"] == "developer" and "developer" not in template:
        plain["role"] = "system"
    if "content" in plain:
        plain["content"] = _text_of(plain["content"], f"{where}.content")
    elif plain["role"] != "assistant" or ("content" not in message and not calls):
        raise ValueError(f'{where}: {_shown(message)} is not allowed; it must have "role" and "content" texts')
    else:
        plain["content"] = None if calls and NONE_CONTENT.search(template) else ""
    reasoning = next((plain[name] for name in REASONING_FIELDS if plain.get(name)), None)
    if reasoning is not None:
        plain |= dict.fromkeys(REASONING_FIELDS, reasoning)
    return plain


def _text_of(content: Any, where: str) -> str:
    """The text of a content; parts are joined by newlines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}: {_shown(content)} is not allowed; it must be a text or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError(
                f'{where}.{index}: {_shown(part)} is not allowed; it must be {{"type": "text", "text": ...}}'
            )
        texts.append(text)
    return "\n".join(texts)


def _plain_calls(calls: Any, where: str, template: str) -> list[dict[str, Any]]:
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise ValueError(f"{where}.tool_calls: {_shown(calls)} is not allowed; it must be a list of calls")
    plain = []
    for index, call in enumerate(calls or ()):
        here = f"{where}.tool_calls.{index}"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f'{here}: {_shown(call)} is not allowed; it must have a "function" with a "name"')
        arguments = _arguments(function.get("arguments"), f"{here}.function.arguments")
        if ADDED_ARGUMENTS.search(template):
            given = function.get("arguments")
            arguments = given if given and isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
        plain.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return plain


def _arguments(arguments: Any, where: str) -> Any:
    """The object that arguments are; none at all are an empty one. All else is refused: no template renders it."""
    found = arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        found = {}
    elif isinstance(arguments, str):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, Mapping) or not _is_json(found):
        raise ValueError(f"{where}: {_shown(arguments)} is not allowed; it must be the text of a JSON object")
    return dict(found)


def _is_json(value: Any) -> bool:
    """Whether a value can be written as JSON, which has no NaN and no infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _give_ids(history: Sequence[dict[str, Any]]) -> None:
    """Give calls without an id one of their own, and results without one that of their call, as far as it is clear.

    Calls of the form before there were tools (`function_call`) have none. A result belongs to the first call of the
    last turn that has its name and no result yet, or else to the first one.
    """
    number = 0
    waiting: list[dict[str, Any]] = []
    for message in history:
        if calls := message.get("tool_calls"):
            waiting = [call for call in calls if not call.get("id")]
            for call in waiting:
                call["id"] = f"call_without_id_{number}"
                number += 1
        if message["role"] == "tool" and not message.get("tool_call_id") and waiting:
            same_name = [call for call in waiting if call["function"]["name"] == message.get("name")]
            call = (same_name or waiting)[0]
            waiting.remove(call)
            message["tool_call_id"] = call["id"]


def _name_results(history: Sequence[dict[str, Any]]) -> None:
    """Give results the names of their calls, which some templates write. The latest call before the result counts."""
    names: dict[str, str] = {}
    for message in history:
        for call in message.get("tool_calls", ()):
            names[str(call["id"])] = call["function"]["name"]
        if message["role"] == "tool" and (name := names.get(str(message.get("tool_call_id")))):
            message.setdefault("name", name)


def _order_results(history: list[dict[str, Any]]) -> None:
    """Put the results that follow an assistant's turn in the order of its calls: many formats write no ids."""
    for begin, message in enumerate(history):
        places = {call.get("id"): place for place, call in enumerate(message.get("tool_calls", ()))}
        end = begin + 1
        while end < len(history) and history[end]["role"] == "tool":
            end += 1
        if places:
            history[begin + 1 : end] = sorted(
                history[begin + 1 : end], key=lambda result: places.get(result.get("tool_call_id"), len(places))
            )


def _shorten_ids(history: Sequence[dict[str, Any]]) -> None:
    for message in history:
        for call in message.get("tool_calls", ()):
            call["id"] = short_id(str(call.get("id", "")))
        if isinstance(message.get("tool_call_id"), str):
            message["tool_call_id"] = short_id(message["tool_call_id"])


def _number_ids(history: Sequence[dict[str, Any]]) -> None:
    """Number the calls over the whole conversation. A result that names no earlier call keeps its id."""
    number = 0
    ids: dict[str, str] = {}
    for message in history:
        for call in message.get("tool_calls", ()):
            new_id = numbered_id(call["function"]["name"], number)
            number += 1
            if isinstance(call.get("id"), str):
                ids[call["id"]] = new_id
            call["id"] = new_id
        if isinstance(result_id := message.get("tool_call_id"), str):
            message["tool_call_id"] = ids.get(result_id, result_id)


def _calls_into_content(message: dict[str, Any], template: str) -> None:
    """Write calls as text, as the model wrote them, for a template that leaves them out."""
    calls = [call["function"] for call in message.pop("tool_calls", ())]
    if not calls:
        return
    if "<|tool_list_start|>" in template:
        parts = [
            f"{call['name']}({', '.join(f'{key}={value!r}' for key, value in call['arguments'].items())})"
            for call in calls
        ]
        text = f"<|tool_call_start|>[{', '.join(parts)}]<|tool_call_end|>"
    else:
        open_tag = "<|tool_call|>" if "<|tool_call|>" in template else "<tool_call>"
        entries = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
        text = open_tag + json.dumps(entries, ensure_ascii=False)
    message["content"] = (message["content"] or "") + text


def _content_into_thinking(message: dict[str, Any]) -> None:
    """Join a content with the thought before it: the template takes one of both beside a call."""
    if message.get("tool_calls") and message.get("content") and message.get("thinking"):
        message["thinking"] += "\n" + message["content"]
        message["content"] = ""
