"""Command lines from options."""

from __future__ import annotations

from collections.abc import Mapping


def flags(values: Mapping[str, object]) -> list[str]:
    """The command line that sets these options."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True or value is False:
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif name == "stop":
            words += [word for text in value for word in (flag, text)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words
