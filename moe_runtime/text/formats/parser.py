"""Splits what a model writes into content, reasoning and tool calls, as it comes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from moe_runtime.text.formats.output import ChatDelta, Output
from moe_runtime.text.formats.scanner import Scanner, Tags
from moe_runtime.text.formats.thoughts import ThoughtFormat
from moe_runtime.text.formats.tool_format import ToolFormat


class OutputParser(Protocol):
    """Reads an output once. Any cut of the text gives the same content, reasoning and calls."""

    def feed(self, text: str) -> ChatDelta:
        """The next piece of the decoded text."""

    def finish(self) -> ChatDelta:
        """No more text follows; returns what was held back."""


class SteppedParser:
    """Runs a format's generator over the text."""

    def __init__(self, scanner: Scanner, output: Output, steps: Generator[None, None, None]) -> None:
        self._scanner = scanner
        self._output = output
        self._steps = steps

    def feed(self, text: str) -> ChatDelta:
        self._scanner.feed(text)
        next(self._steps, None)
        return self._output.take()

    def finish(self) -> ChatDelta:
        self._scanner.end()
        next(self._steps, None)
        self._output.finish()
        return self._output.take()


def tagged_parser(
    tools: ToolFormat | None, thoughts: ThoughtFormat | None, prompt: str, output: Output
) -> OutputParser:
    """The parser of a format that marks thoughts and calls with tags in one text."""
    scanner = Scanner()
    return SteppedParser(scanner, output, _TaggedText(tools, thoughts, scanner, output).read(prompt))


class _TaggedText:
    """One output: text, in which tags begin and end thoughts and calls."""

    def __init__(
        self, tools: ToolFormat | None, thoughts: ThoughtFormat | None, scanner: Scanner, output: Output
    ) -> None:
        self._tools = tools
        self._thoughts = thoughts
        self._scanner = scanner
        self._output = output
        self._close = ""  # the closing tag of the thought that is open
        self._lacks_close = False  # a call has ended the thought
        self._answer_end = ""
        self._text_tags = Tags(*text_tags(tools, thoughts))
        opens = tools.opens if tools and thoughts and thoughts.with_calls else ()
        self._thought_tags = {close: Tags(close, *opens) for close in thoughts.closes} if thoughts else {}

    def read(self, prompt: str) -> Generator[None, None, None]:
        scanner, output = self._scanner, self._output
        if self._thoughts:
            yield from self._begin(self._thoughts, prompt)
        while True:
            channel = output.reasoning if self._close else output.content
            tag = yield from scanner.until(self._thought_tags.get(self._close, self._text_tags), channel.write)
            if not tag:
                return
            if self._tools and tag in self._tools.opens:
                scanner.keep()
                is_call = yield from self._tools.read(tag, scanner, output)
                text = tag + scanner.kept()
                if is_call:
                    self._end_thought_with_call()
                    if scanner.ended:  # what remains is the beginning of a tag
                        return
                else:
                    channel.write(text)
            elif self._thoughts:
                yield from self._thought_tag(self._thoughts, tag)

    def _begin(self, thoughts: ThoughtFormat, prompt: str) -> Generator[None, None, None]:
        """Take up what the prompt has begun."""
        opened_by = thoughts.opened_by(prompt)
        if thoughts.in_content:
            self._output.content.write(opened_by)
        elif opened_by:
            yield from self._scanner.blanks()
            again = yield from self._scanner.accept(*thoughts.opens)  # some models repeat the prompt's tag
            yield from self._begin_thought(thoughts, again or opened_by)
        else:
            yield from self._begin_answer(thoughts)

    def _begin_thought(self, thoughts: ThoughtFormat, tag: str) -> Generator[None, None, None]:
        self._close = dict(thoughts.pairs)[tag]
        self._lacks_close = False
        self._output.content.end()
        if thoughts.label:
            yield from self._scanner.blanks()
            yield from self._scanner.accept(thoughts.label)

    def _begin_answer(self, thoughts: ThoughtFormat) -> Generator[None, None, None]:
        if thoughts.answer:
            yield from self._scanner.blanks()
            if (yield from self._scanner.accept(thoughts.answer[0])):
                self._answer_end = thoughts.answer[1]

    def _end_thought_with_call(self) -> None:
        self._lacks_close = self._lacks_close or bool(self._close)
        self._close = ""
        self._output.reasoning.end()

    def _thought_tag(self, thoughts: ThoughtFormat, tag: str) -> Generator[None, None, None]:
        content = self._output.content
        if self._close:
            self._close = ""
            self._output.reasoning.end()
            yield from self._begin_answer(thoughts)
        elif tag in thoughts.opens and (thoughts.anywhere or content.at_start):
            yield from self._begin_thought(thoughts, tag)
        elif tag in thoughts.closes and (thoughts.anywhere or self._lacks_close):
            self._lacks_close = False
        elif tag == self._answer_end:
            self._answer_end = ""
            content.end()
        else:
            content.write(tag)


def text_tags(tools: ToolFormat | None, thoughts: ThoughtFormat | None) -> tuple[str, ...]:
    """The tags that may come where no thought is open."""
    opens = tools.opens if tools else ()
    return (*opens, *(thoughts.tags if thoughts and not thoughts.in_content else ()))
