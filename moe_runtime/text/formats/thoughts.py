"""How families mark their thoughts (reasoning)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThoughtFormat:
    """Tags around a thought.

    Attributes:
        pairs: opening and closing tags.
        label: a word after the opening tag that is no part of the thought.
        anywhere: the tags are control tokens, which no text can mention. Else an opening tag counts only where a
            segment of the content begins.
        answer: tags around the answer after the thought; they are left out.
        with_calls: a call within a thought is a call, and ends the thought.
        in_content: the thought stays in the content with its tags; an opening tag that the prompt holds is repeated.
    """

    pairs: tuple[tuple[str, str], ...]
    label: str = ""
    anywhere: bool = False
    answer: tuple[str, str] | None = None
    with_calls: bool = True
    in_content: bool = False

    @property
    def opens(self) -> tuple[str, ...]:
        return tuple(open_tag for open_tag, _ in self.pairs)

    @property
    def closes(self) -> tuple[str, ...]:
        return tuple(close for _, close in self.pairs)

    @property
    def tags(self) -> tuple[str, ...]:
        return (*self.opens, *self.closes, *(self.answer or ()))

    def opened_by(self, prompt: str, continued: str) -> str:
        """The opening tag of the thought that a prompt leaves open, or "".

        Messages may mention tags, so only the assistant's turn that the prompt has begun counts.

        Args:
            continued: the final message's content, if the model continues it.
        """
        begun = self._after_thoughts(continued)
        if self.anywhere:
            opened = max(self.opens, key=begun.rfind)
            is_open = opened in begun
        else:
            opened = next((tag for tag in self.opens if begun.startswith(tag)), "")
            is_open = opened != ""
        if is_open or any(close in continued for close in self.closes):
            return opened if is_open else ""
        end = prompt.rstrip().removesuffix(continued.strip()).rstrip().removesuffix(self.label)
        return next((tag for tag in self.opens if end.endswith(tag)), "")

    def is_within(self, continued: str) -> bool:
        """Whether a text that the model continues ends within a text. After a tag, blanks are left out."""
        return self._after_thoughts(continued).removesuffix(self.label) not in ("", *self.tags)

    def _after_thoughts(self, text: str) -> str:
        """What follows the last closing tag, without the blanks around it."""
        return text[max(text.rfind(close) + len(close) if close in text else 0 for close in self.closes) :].strip()


def _think(answer: tuple[str, str] | None = None, with_calls: bool = True) -> ThoughtFormat:
    return ThoughtFormat((("<think>", "</think>"),), answer=answer, with_calls=with_calls)


THINK = _think()
THINK_IN_CONTENT = ThoughtFormat(THINK.pairs, in_content=True)
SEED_THINK = ThoughtFormat((("<seed:think>", "</seed:think>"),))
MISTRAL_THINK = ThoughtFormat((("[THINK]", "[/THINK]"),), anywhere=True)
GEMMA_THOUGHT = ThoughtFormat((("<|channel>", "<channel|>"),), label="thought", anywhere=True)
HUNYUAN_THINK = _think(answer=("<answer>", "</answer>"), with_calls=False)
ERNIE_THINK = _think(answer=("<response>", "</response>"))
GRANITE_THINK = ThoughtFormat(
    (
        ("<think>", "</think>"),
        ("Here is my thought process:", "Here is my response:"),
        ("Here's my thought process:", "Here's my response:"),
    ),
    answer=("<response>", "</response>"),
)
