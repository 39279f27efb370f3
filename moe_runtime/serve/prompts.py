"""Turns a client's prompt into token ids. Long texts take time, so this runs outside of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_runtime.serve.bodies import Message

if TYPE_CHECKING:
    from moe_runtime.text.tokenizer import Tokenizer


async def encode_text(tokenizer: Tokenizer | None, text: str) -> list[int]:
    """Token ids of a text. Raises ValueError if there is no tokenizer."""
    if tokenizer is None:
        raise ValueError("prompt: text is not allowed, as this server has no tokenizer; send token ids")
    return await asyncio.to_thread(tokenizer.encode, text)


async def encode_chat(tokenizer: Tokenizer | None, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat in the model's template. Raises ValueError if there is none or it refuses the messages."""
    if tokenizer is None:
        raise ValueError("messages: not allowed, as this server has no tokenizer; send token ids")
    plain = [message.plain() for message in messages]
    return (await asyncio.to_thread(tokenizer.apply_chat_template, plain)).token_ids
