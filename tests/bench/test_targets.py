"""The whole bench command, on engines in this process and on servers."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from bench_fakes import BenchEngine, KnownVocabulary
from places import SUPPORT
from serve_clients import ServerThread
from serve_fakes import RANK_ERROR
from tiny_models import make_model, save

from moe_runtime.bench.targets import RequestError, ServerTarget, start_engine
from moe_runtime.cli import main as cli
from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.keys import authorization
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.executor import RankError

WORDS = ["--input-len", "4-9", "--output-len", "3-6", "--num-prompts", "5"]


@pytest.fixture
def built(monkeypatch):
    engines = []

    def build_engine(config):
        engines.append(BenchEngine(config))
        return engines[-1]

    monkeypatch.setattr("moe_runtime.build.build_engine", build_engine)
    return engines


def test_an_engine_of_this_process(built, tmp_path, capsys):
    outputs = [tmp_path / "x.json", tmp_path / "x.png"]
    words = [*WORDS, "--request-rate", "200,inf", "-o", str(outputs[0]), "--output", str(outputs[1]), "--seed", "3"]
    assert cli.main(["bench", "here", *words, "--num-warmups", "1", "--ep-size", "2"]) == 0
    (engine,) = built
    assert engine.closed and engine.config.ep_size == 2 and engine.config.seed == 3
    assert len(engine.added) == 1 + 2 * 5
    for _, prompt, params in engine.added:
        assert 4 <= len(prompt) <= 9 and 3 <= params.max_tokens <= 6
        assert params == SamplingParams(temperature=0, max_tokens=params.max_tokens, ignore_eos=True)
    assert "request rate (req/s)" in capsys.readouterr().out
    first, second = json.loads(outputs[0].read_text())["results"]
    assert first["completed"] == second["completed"] == 5, "the warm-up does not count"
    assert first["total_output_tokens"] == sum(params.max_tokens for _, _, params in engine.added[1:6])
    assert outputs[1].read_bytes().startswith(b"\x89PNG")


def test_a_real_engine(tmp_path, capsys):
    path = save(make_model("qwen3"), tmp_path)
    assert cli.main(["bench", str(path), "--skip-tokenizer-init", *WORDS, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{path.name}, float32, 1 rank on cpu: 5 requests of 4-9 tokens")


def test_a_server(tmp_path, capsys):
    output = tmp_path / "x.json"
    with ServerThread(KnownVocabulary) as server:
        words = [*WORDS, "--url", server.url + "/", "--request-rate", "100", "-o", str(output), "--seed", "2"]
        assert cli.main(["bench", *words]) == 0
    content = json.loads(output.read_text())
    assert content["results"][0]["completed"] == 5 and content["machine"] is None
    assert content["engine"]["status"] == "ready"


def test_a_server_that_does_not_say_its_vocabulary(tmp_path, capsys):
    path = save(make_model("qwen3"), tmp_path)
    with ServerThread(BenchEngine) as server:
        assert cli.main(["bench", *WORDS, "--url", server.url]) == 2
        assert capsys.readouterr().err.startswith("moe-runtime: error: model: missing; it is needed with text")
        assert cli.main(["bench", str(path), *WORDS, "--url", server.url]) == 0


def test_failed_requests_are_counted_and_the_command_fails(built, monkeypatch, capsys):
    add_request, count = BenchEngine.add_request, iter(range(100))

    def refuse_some(self, request_id, prompt, params, *rest):
        if next(count) in (3, 4):
            raise ValueError("prompt: not today")
        add_request(self, request_id, prompt, params)

    monkeypatch.setattr(BenchEngine, "add_request", refuse_some)
    assert cli.main(["bench", "here", *WORDS]) == 1
    out = capsys.readouterr().out
    assert "failed at rate inf: 2 x prompt: not today" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith(("completed", "failed "))][:2] == [
        "3",
        "2",
    ]


@pytest.fixture
def dying(monkeypatch):
    """Engines that die at their fourth step."""
    monkeypatch.setattr("moe_runtime.build.build_engine", lambda config: BenchEngine(config, die_at=4))


def test_an_engine_that_dies_fails_all_that_is_left(dying, capsys):
    assert cli.main(["bench", "here", *WORDS, "--num-warmups", "0", "--output-len", "6"]) == 1
    out = capsys.readouterr().out
    assert f"x the engine has failed: {RANK_ERROR}" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("failed  ")] == ["5"]


def test_a_warm_up_that_fails_ends_the_command(dying, capsys):
    assert cli.main(["bench", "here", *WORDS, "--output-len", "6"]) == 1
    assert f"error: a warm-up request failed: the engine has failed: {RANK_ERROR}" in capsys.readouterr().err


def test_a_server_that_refuses_or_goes_away():
    async def ask(url, prompt):
        target = await ServerTarget(url).connect()
        return [count async for count in target.stream(prompt, 5)]

    with ServerThread(KnownVocabulary) as server:
        assert asyncio.run(ask(server.url, [4, 5])) == [1] * 5
        with pytest.raises(RequestError, match=r"^400: .*token id 5000 is not allowed"):
            asyncio.run(ask(server.url, [5000]))
    with ServerThread(lambda: KnownVocabulary(die_at=3)) as server, pytest.raises(RequestError, match="rank 1"):
        asyncio.run(ask(server.url, [4, 5]))


def test_a_server_that_needs_a_key(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")

    async def ask(url, path):
        target = await ServerTarget(url, authorization(path)).connect()
        return [count async for count in target.stream([4, 5], 5)]

    with ServerThread(KnownVocabulary, ServerConfig(api_key_file=str(keys))) as server:
        assert asyncio.run(ask(server.url, str(keys))) == [1] * 5
        with pytest.raises(RequestError, match=r"^401: "):
            asyncio.run(ask(server.url, None))


def answer_once(listener, answer):
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "is not a server of this runtime"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "is not a server of this runtime"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "is not a server of this runtime"),
        (b"", "is not a server of this runtime"),
        (b'HTTP/1.1 503 X\r\nContent-Length: 21\r\n\r\n{"status": "loading"} ', "is loading, not ready"),
    ],
)
def test_other_servers(answer, message, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_once, args=(listener, answer))
        thread.start()
        assert cli.main(["bench", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}"]) == 2
        thread.join()
    error = capsys.readouterr().err
    assert error.startswith("moe-runtime: error: url: 'http://127.0.0.1:") and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model: missing"),
        (["x", "--request-rate", "a"], "request_rate: 'a' is not allowed; it must be a number"),
        (["x", "--request-rate", "-1"], "request_rate: "),
        (["x", "--ep-size", "0"], "ep_size: 0 is not allowed"),
        (["x", "-o", "x.gif"], "output: 'x.gif' is not allowed"),
        (["x", "--input-len", "190", "--output-len", "64"], "input_len, output_len: a request has "),
        (["x", "--text", "/no/such.txt"], "/no/such.txt: No such file"),
        (["--url", "http://127.0.0.1:1"], "url: 'http://127.0.0.1:1' is not a server of this runtime"),
        (["--url", "http://127.0.0.1:1", "--ep-size", "2"], "ep_size: is not allowed with url"),
    ],
)
def test_bad_input_gets_one_line(built, words, message, capsys):
    assert cli.main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"moe-runtime: error: {message}")
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert all(engine.closed for engine in built)


def test_options_in_a_file(built, tmp_path, capsys):
    file = tmp_path / "bench.yaml"
    file.write_text(
        "model: here\nrequest_rate: [100, .inf]\nnum_prompts: 2\ninput_len: 5\noutput-len: 3-4\nep_size: 2\n"
    )
    assert cli.main(["bench", "--config", str(file), "--num-warmups", "0"]) == 0
    assert built[0].config.ep_size == 2 and len(built[0].added) == 4
    assert {len(prompt) for _, prompt, _ in built[0].added} == {5}
    assert "inf" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RankError("rank 0 is gone"), RuntimeError("a mistake of ours")])
def test_an_engine_that_cannot_start(error):
    def fail():
        raise error

    async def start():
        async with start_engine(fail):
            raise AssertionError

    with pytest.raises(RankError, match=str(error)):
        asyncio.run(start())


@pytest.mark.parametrize("engine", ["time.sleep(60)", "print('loaded', flush=True) or BenchEngine(step_seconds=0.05)"])
def test_an_interrupt_ends_it_loading_or_running(engine):
    program = (
        f"import sys, time; sys.path.insert(0, {str(SUPPORT)!r})\n"
        "import moe_runtime.build\nfrom bench_fakes import BenchEngine\nfrom moe_runtime.cli.main import main\n"
        f"moe_runtime.build.build_engine = lambda config: print('building', flush=True) or {engine}\n"
        "sys.exit(main(['bench', 'x', '--request-rate', '1', '--num-prompts', '100']))"
    )
    command = [sys.executable, "-P", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "building\n"
        if "loaded" in engine:
            assert process.stdout.readline() == "loaded\n"
            time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "") and "Traceback" not in error


def test_an_infinite_rate_is_the_default(built):
    assert cli.main(["bench", "here", *WORDS, "--num-warmups", "0"]) == 0
    assert math.isinf(cli.BenchOptions().request_rate[0]) and len(built[0].added) == 5
