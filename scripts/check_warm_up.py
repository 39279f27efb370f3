"""Checks that a server that is ready is warm: its first request waits no longer for its first token than its second.

    python scripts/check_warm_up.py [--model demo] [--starts 5] [-- FLAGS OF serve]

Starts the server several times and compares the medians. Exits with 1 if the first one's is more than 1.2 times the
second one's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from served.server import Server

ALLOWED = 1.2
WORDS = ["the", "sea", "is", "deep", "and", "bees", "make", "honey"]
NUM_REQUESTS = 5


def first_token_seconds(url: str) -> float:
    """Seconds from sending a chat until the first event with a token."""
    words = " ".join(random.choices(WORDS, k=40))
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 8, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.readline()
        seconds = time.perf_counter() - start
        reply.read()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--starts", type=int, default=5, help="how often the server is started (default 5)")
    parser.add_argument("flags", nargs="*", help="flags of serve, after --")
    options = parser.parse_args()
    seconds: list[list[float]] = []
    starts = []
    for _ in range(options.starts):
        begin = time.perf_counter()
        with Server(options.model, *(options.flags or ("--ep-size", "2"))) as server:
            starts.append(time.perf_counter() - begin)
            seconds.append([first_token_seconds(server.url) for _ in range(NUM_REQUESTS)])
            server.stop()
    medians = [statistics.median(times) for times in zip(*seconds, strict=True)]
    print(
        f"ready after {statistics.median(starts):.2f} s; seconds to the first token, median of {options.starts} starts:"
    )
    print("| request | s |\n|---|---|")
    print("\n".join(f"| {number} | {median:.3f} |" for number, median in enumerate(medians, 1)))
    return int(medians[0] > ALLOWED * medians[1])


if __name__ == "__main__":
    raise SystemExit(main())
