"""Forms of call ids that formats ask for."""

from __future__ import annotations

import hashlib
import re

SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


def short_id(text: str) -> str:
    """Nine letters or digits, as Mistral's templates ask for: the text itself, or what follows from it."""
    return text if SHORT_ID.fullmatch(text) else hashlib.sha256(text.encode(errors="replace")).hexdigest()[:9]


def numbered_id(name: str, number: int) -> str:
    """Kimi's form; `number` counts the calls of the whole conversation from 0."""
    return f"functions.{name}:{number}"
