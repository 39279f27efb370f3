"""Splits what a model writes into content, reasoning and tool calls, as it comes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from moe_runtime.text.formats.output import Channel, ChatDelta, Output, Undecided
from moe_runtime.text.formats.scanner import Scanner, Steps, Tags
from moe_runtime.text.formats.thoughts import ThoughtFormat
from moe_runtime.text.formats.tool_format import ToolFormat


class OutputParser(Protocol):
    """Reads an output once. Any cut of the text gives the same content, reasoning and calls."""

    def feed(self, text: str) -> ChatDelta:
        """The next piece of the decoded text."""

    def finish(self, is_complete: bool = False) -> ChatDelta:
        """No more text follows; returns what was held back.

        Args:
            is_complete: the model has ended the output itself, so arguments that have not begun are an empty object.
        """


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

    def finish(self, is_complete: bool = False) -> ChatDelta:
        self._scanner.end()
        next(self._steps, None)
        self._output.finish(is_complete)
        return self._output.take()


def tagged_parser(
    tools: ToolFormat | None, thoughts: ThoughtFormat | None, output: Output, opened_by: str, is_within: bool
) -> OutputParser:
    """The parser of a format that marks thoughts and calls with tags in one text.

    Args:
        opened_by: the opening tag of the thought that the prompt leaves open.
        is_within: the output goes on within a text that the prompt has begun.
    """
    scanner = Scanner()
    return SteppedParser(scanner, output, _TaggedText(tools, thoughts, scanner, output).read(opened_by, is_within))


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
        self._late_close = ""  # that of a thought in which there was a call; the text after it is undecided
        self._undecided = Undecided()
        self._answer_end = ""
        ignored = tools.plain_opens if tools and not output.tool_names else ()
        self._text_tags = Tags(*(tag for tag in text_tags(tools, thoughts) if tag not in ignored))
        opens = [tag for tag in tools.opens if tag not in ignored] if tools and thoughts and thoughts.with_calls else ()
        self._thought_tags = {close: Tags(close, *opens) for close in thoughts.closes} if thoughts else {}

    def read(self, opened_by: str, is_within: bool) -> Generator[None, None, None]:
        if self._thoughts:
            yield from self._begin(self._thoughts, opened_by, is_within)
        yield from self._read_all()
        self._undecided.move_to(self._output.content)

    @property
    def _channel(self) -> Channel | Undecided:
        """Where text goes."""
        if self._close:
            return self._output.reasoning
        return self._undecided if self._late_close else self._output.content

    def _read_all(self) -> Steps[None]:
        scanner, output = self._scanner, self._output
        while True:
            tags = self._thought_tags.get(self._close, self._text_tags)
            tag = yield from scanner.until(tags, self._channel.write)
            if not tag:
                return
            if self._tools and tag in self._tools.opens:
                scanner.keep(tag)
                num_before = output.num_begun
                is_read = yield from self._tools.read(tag, scanner, output)
                kept = scanner.kept()
                if is_read or output.num_begun > num_before:
                    self._end_thought_with_call()
                if not is_read:
                    self._channel.write(kept)
                elif scanner.ended:  # what remains is the beginning of a tag
                    return
            elif self._thoughts:
                yield from self._thought_tag(self._thoughts, tag)

    def _begin(self, thoughts: ThoughtFormat, opened_by: str, is_within: bool) -> Steps[None]:
        """Take up what the prompt has begun."""
        if is_within:
            self._close = "" if thoughts.in_content or not opened_by else dict(thoughts.pairs)[opened_by]
        elif thoughts.in_content:
            self._output.content.write(opened_by)
        elif opened_by:
            yield from self._scanner.blanks()
            again = yield from self._scanner.accept(*thoughts.opens)  # some models repeat the prompt's tag
            yield from self._begin_thought(thoughts, again or opened_by)
        else:
            yield from self._begin_answer(thoughts)

    def _begin_thought(self, thoughts: ThoughtFormat, tag: str) -> Steps[None]:
        self._undecided.move_to(self._output.content)
        self._close, self._late_close = dict(thoughts.pairs)[tag], ""
        self._output.content.end()
        if thoughts.label:
            yield from self._scanner.blanks()
            yield from self._scanner.accept(thoughts.label)

    def _begin_answer(self, thoughts: ThoughtFormat) -> Steps[None]:
        if thoughts.answer:
            yield from self._scanner.blanks()
            if (yield from self._scanner.accept(thoughts.answer[0])):
                self._answer_end = thoughts.answer[1]

    def _end_thought_with_call(self) -> None:
        if self._close:
            self._output.reasoning.end()
            self._close, self._late_close = "", self._close
        elif self._late_close:
            self._undecided.end()

    def _thought_tag(self, thoughts: ThoughtFormat, tag: str) -> Steps[None]:
        if tag in (self._close, self._late_close):
            self._undecided.move_to(self._output.reasoning)
            self._close = self._late_close = ""
            self._output.reasoning.end()
            yield from self._begin_answer(thoughts)
        elif tag in thoughts.opens and (thoughts.anywhere or self._channel.at_start):
            yield from self._begin_thought(thoughts, tag)
        elif tag in thoughts.closes and thoughts.anywhere:
            pass
        elif tag == self._answer_end:
            self._answer_end = ""
            self._channel.end()
        else:
            self._channel.write(tag)


def text_tags(tools: ToolFormat | None, thoughts: ThoughtFormat | None) -> tuple[str, ...]:
    """The tags that may come where no thought is open."""
    opens = tools.opens if tools else ()
    return (*opens, *(thoughts.tags if thoughts and not thoughts.in_content else ()))
