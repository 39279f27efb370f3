"""`moe-runtime heatmap`: draw the experts' load of a running server or of a saved file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_runtime.config.checks import check_output
from moe_runtime.config.options import user_mistakes

if TYPE_CHECKING:
    from moe_runtime.balancer.load import ExpertLoad

URL_TIMEOUT = 30.0


def heatmap(namespace: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserMistake: there is no such load, or an output file cannot be written.
    """
    from moe_runtime.balancer.load import SUFFIXES, ExpertLoad
    from moe_runtime.serve.keys import authorization

    with user_mistakes():
        for path in namespace.output:
            written = path.with_suffix(path.suffix.lower())  # a suffix may be in capitals
            check_output("output", written, SUFFIXES if namespace.before is None else (".png",))
        load = (
            fetch_load(namespace.url, authorization(namespace.api_key_file))
            if namespace.url
            else ExpertLoad.load(namespace.load)
        )
        before = None if namespace.before is None else ExpertLoad.load(namespace.before)
        if namespace.phase:
            load = _only_phase(load, namespace.phase)
            before = before and _only_phase(before, namespace.phase)
        if before is not None:
            from moe_runtime.balancer.heatmap import draw_pair

            picture = draw_pair(before, load)
            for path in namespace.output:
                path.write_bytes(picture)
            return 0
        for path in namespace.output:
            load.save(path)
    return 0


def fetch_load(url: str, headers: Mapping[str, str]) -> ExpertLoad:
    """The load of a running server. Raises ValueError if there is none at `url`."""
    import urllib.request

    from moe_runtime.balancer.load import ExpertLoad

    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url: {url!r} is not allowed; it must start with http:// or https://")
    try:
        request = urllib.request.Request(url.rstrip("/") + "/experts/load", headers=dict(headers))
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as answer:
            content = json.load(answer)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"url: {url!r} returned no load ({error})") from error
    return ExpertLoad.from_dict(content)


def _only_phase(load: ExpertLoad, phase: str) -> ExpertLoad:
    """The load with the other phase's counts left out."""
    return replace(load, tokens={name: counts if name == phase else counts * 0 for name, counts in load.tokens.items()})
