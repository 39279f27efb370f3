"""Runs the demo: two ranks under torchrun serve the demo model, answer prompts, and draw a heatmap.

Run it with `scripts/demo`. It leaves no process running, even on Ctrl-C or when a step fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STREAMED = "Tell me a short story about the sea."
QUESTIONS = ["What is the capital of France?", "What do bees make?", "Why is the sky blue?"]
START_DEADLINE = 300.0
STOP_DEADLINE = 40.0
REQUEST_DEADLINE = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="how many ranks (default 2)")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default 64)")
    parser.add_argument("--heatmap", type=Path, default=Path("heatmap.png"), help="where to write it")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # even if the caller's shell ignores them
        signal.signal(number, _interrupt)
    started = time.monotonic()
    try:
        from moe_runtime.demo.checkpoint import ensure_demo_model

        say(f"the model: {ensure_demo_model()}")
        with serving(args.ranks) as url:
            say(f"ready after {time.monotonic() - started:.1f} s")
            ask(url, args.max_tokens)
            args.heatmap.write_bytes(fetch(f"{url}/experts/heatmap.png"))
            say(f"wrote {args.heatmap}; hottest: {hottest(url)}")
    except KeyboardInterrupt:
        say("interrupted; everything has ended")
        return 130
    except (DemoError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"done in {time.monotonic() - started:.1f} s; all processes have ended")
    return 0


class DemoError(RuntimeError):
    """A step failed; the message names it."""


def say(text: str) -> None:
    print(f"\n--- {text}", flush=True)


@contextmanager
def serving(num_ranks: int) -> Iterator[str]:
    """Start the server under torchrun and wait until it is ready; end it in every case."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += ["-m", "moe_runtime", "serve", "demo", "--port", str(port)]
    say(f"torchrun {' '.join(command[3:])}")
    # With a session of its own, Ctrl-C reaches only this script, which then stops the server cleanly.
    server = subprocess.Popen(command, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(server, url)
        yield url
        stop(server, url)
    finally:
        end(server, url)


def wait_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_DEADLINE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"the server ended with exit code {server.returncode} before it was ready")
        try:
            fetch(f"{url}/ready")
            return
        except OSError:
            time.sleep(0.2)
    raise DemoError(f"the server was not ready within {START_DEADLINE:.0f} s")


def stop(server: subprocess.Popen[bytes], url: str) -> None:
    """A clean stop: the front drains, all hosts exit 0, and so does torchrun."""
    os.kill(json.loads(fetch(f"{url}/health"))["pid"], signal.SIGTERM)
    try:
        code = server.wait(STOP_DEADLINE)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the server did not stop within {STOP_DEADLINE:.0f} s") from None
    if code != 0:
        raise DemoError(f"the server stopped with exit code {code}")


def end(server: subprocess.Popen[bytes], url: str) -> None:
    """End a server after an interruption or a failure: signal the front, then torchrun, then kill."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleanup
    for ask_to_end in (
        lambda: os.kill(json.loads(fetch(f"{url}/health"))["pid"], signal.SIGTERM),
        lambda: os.killpg(server.pid, signal.SIGTERM),
        lambda: os.killpg(server.pid, signal.SIGKILL),
    ):
        if server.poll() is not None:
            return
        try:
            ask_to_end()
            server.wait(STOP_DEADLINE)
        except (OSError, subprocess.TimeoutExpired):
            continue


def fetch(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_DEADLINE) as answer:
        content: bytes = answer.read()
        return content


def body_of(question: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0, **more}


def ask(url: str, max_tokens: int) -> None:
    """One streamed answer, then several at once."""
    say(f"streamed: {STREAMED}")
    begin, first, count = time.monotonic(), 0.0, 0
    for event in stream(url, body_of(STREAMED, max_tokens, stream=True)):
        first = first or time.monotonic() - begin
        count += len(event["token_ids"])
        print(event["text"], end="", flush=True)
    seconds = time.monotonic() - begin
    print(f"\n[{count} tokens, first after {first:.2f} s, {count / seconds:.1f} tokens/s]")

    say(f"{len(QUESTIONS)} questions at once")
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        bodies = [body_of(question, max_tokens) for question in QUESTIONS]
        answers = [json.loads(raw) for raw in pool.map(lambda body: fetch(f"{url}/generate", body), bodies)]
    seconds = time.monotonic() - begin
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"Q: {question}\nA: {answer['text'].strip()}\n")
    count = sum(answer["usage"]["completion_tokens"] for answer in answers)
    print(f"[{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s]")


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Server-sent events of `POST /generate`, up to `[DONE]`."""
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=REQUEST_DEADLINE) as answer:
        for line in answer:
            data = line.decode().strip().removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)
    raise DemoError("the stream ended without [DONE]")


def hottest(url: str) -> str:
    load = json.loads(fetch(f"{url}/experts/load"))
    top = load["hottest"]["total"][0]
    return f"layer {top['layer']}, expert {top['expert']} with {top['share']:.1%} of its layer's tokens"


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
