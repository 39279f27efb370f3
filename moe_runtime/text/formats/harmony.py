"""Harmony, which gpt-oss writes: messages with a header, `<|channel|>analysis<|message|>...<|end|>`.

The header's recipient makes a message a tool call; its channel says whether it is a thought or content.
"""

from __future__ import annotations

import re
from collections.abc import Generator

from moe_runtime.text.formats.json_objects import pass_arguments
from moe_runtime.text.formats.output import Output
from moe_runtime.text.formats.parser import OutputParser, SteppedParser
from moe_runtime.text.formats.scanner import Scanner, Steps, Tags, drop

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
HARMONY_TAGS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
HARMONY_STOPS = (CALL, RETURN)

HEADER_END = Tags(MESSAGE, START, END, CALL, RETURN)
BODY_END = Tags(END, CALL, RETURN, START, CHANNEL)
NEXT_HEADER = Tags(START, CHANNEL, MESSAGE)
HEADER_TAGS = (CHANNEL, START, MESSAGE, CONSTRAIN)
NOT_BLANK = re.compile(r"[^\s<]*")
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
FUNCTIONS = "functions."


def harmony_parser(prompt: str, output: Output, split_reasoning: bool) -> OutputParser:
    """Args:
    split_reasoning: the analysis channel is reasoning; else it is content.
    """
    scanner = Scanner()
    return SteppedParser(scanner, output, _Harmony(scanner, output, split_reasoning).read(prompt))


class _Harmony:
    def __init__(self, scanner: Scanner, output: Output, split_reasoning: bool) -> None:
        self._scanner = scanner
        self._output = output
        self._split_reasoning = split_reasoning
        self._early = ""  # the beginning of an answer that could have been a header

    def read(self, prompt: str) -> Generator[None, None, None]:
        header, ended_by, _ = prompt.rpartition(START)[2].partition(MESSAGE) if START in prompt else ("", "", "")
        if not ended_by:
            yield from self._scanner.blanks()
            begun = yield from self._begun_header()
            if begun:
                header, ended_by = f"{header} {begun}", MESSAGE if begun.endswith(MESSAGE) else begun
            elif self._scanner.at_end:
                return
            else:  # a model that writes no header writes an answer
                ended_by = MESSAGE
        while True:
            if ended_by != MESSAGE:
                pieces = [header]
                ended_by = yield from self._scanner.until(HEADER_END, pieces.append)
                header = "".join(pieces)
            if ended_by == MESSAGE:
                ended_by = yield from self._body(header)
            if ended_by not in ("", START, CHANNEL):
                ended_by = yield from self._scanner.until(NEXT_HEADER, drop)
            if not ended_by:
                return
            header = CHANNEL if ended_by == CHANNEL else ""

    def _begun_header(self) -> Steps[str]:
        """What shows that the output begins with a header; "" if it does not. An answer may begin with its words."""
        scanner = self._scanner
        scanner.keep()
        begun = yield from scanner.accept(*HEADER_TAGS, "to=", "assistant")
        if begun == "assistant":
            yield from scanner.blanks()
            begun += " " + (yield from scanner.accept(*HEADER_TAGS, "to="))
        if begun.endswith("to="):
            recipient = yield from scanner.word(NOT_BLANK)
            yield from scanner.blanks()
            begun += recipient if recipient.startswith(FUNCTIONS) or (yield from scanner.look(2)) == "<|" else " "
        kept = scanner.kept()
        if begun.endswith(" ") and not scanner.at_end:
            self._early = kept
            return ""
        return begun

    def _body(self, header: str) -> Steps[str]:
        """Read a message up to its end. Returns the tag that ends it."""
        output = self._output
        recipients = RECIPIENT.findall(header)
        for recipient in recipients:
            name = recipient.removeprefix(FUNCTIONS)
            if name != recipient or output.knows(name):
                call = output.begin_call(name)
                yield from pass_arguments(self._scanner, call)
                ended_by = yield from self._scanner.until(BODY_END, drop)
                if ended_by:
                    call.close()
                return ended_by
        if recipients:  # a built-in tool, which this server does not have
            return (yield from self._scanner.until(BODY_END, drop))
        is_thought = CHANNEL_NAME.findall(header)[-1:] == ["analysis"] and self._split_reasoning
        channel = output.reasoning if is_thought else output.content
        if not channel.is_empty:
            channel.end()
        channel.write(self._early)
        self._early = ""
        return (yield from self._scanner.until(BODY_END, channel.write))
