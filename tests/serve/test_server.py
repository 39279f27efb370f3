"""A real server: in a thread to test the socket, in a process to test signals and exit codes."""

import json
import random
import re
import signal
import socket
import threading
import time

import httpx
import pytest
from serve_clients import ServerProcess, ServerThread, events_of
from serve_fakes import DEADLINE, RANK_ERROR, FakeEngine, wait_until

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.server import bind, run_server


def test_tokens_are_streamed_as_they_come():
    fake = FakeEngine(allow=threading.Semaphore(0))
    body = {"prompt_token_ids": [1], "max_tokens": 5, "stream": True}
    with ServerThread(lambda: fake) as server, httpx.stream("POST", server.url + "/generate", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        for token in range(2, 7):
            fake.allow.release()  # no step runs before the last one's token has arrived here
            assert json.loads(next(lines).removeprefix("data: "))["token_ids"] == [token]
        assert list(lines) == ["data: [DONE]"]


def test_many_clients_at_once(seed):
    rng = random.Random(seed)
    jobs = [(rng.randrange(800), rng.randint(1, 30), rng.random() < 0.5) for _ in range(12)]
    results = {}

    def client(number, url, start, max_tokens, stream):
        body = {"prompt_token_ids": [start], "max_tokens": max_tokens, "stream": stream}
        response = httpx.post(url + "/generate", json=body, timeout=DEADLINE)
        parts = events_of(response.text)[:-1] if stream else [response.json()]
        results[number] = [token for part in parts for token in part["token_ids"]]

    with ServerThread(lambda: FakeEngine(step_seconds=0.002)) as server:
        threads = [threading.Thread(target=client, args=(i, server.url, *job)) for i, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    assert results == {i: list(range(start + 1, start + 1 + n)) for i, (start, n, _) in enumerate(jobs)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_aborted(stream):
    fake = FakeEngine(step_seconds=0.01, max_model_len=10**6)
    body = json.dumps({"prompt_token_ids": [1], "max_tokens": None, "stream": stream}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with ServerThread(lambda: fake) as server:
        with socket.create_connection(server.listener.getsockname()) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: fake.num_tokens > 3, "some tokens have come")
        wait_until(lambda: fake.aborted, "the request is aborted")
        assert not fake.running
        assert httpx.post(server.url + "/generate", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_slow_reader_holds_up_nobody():
    fake = FakeEngine(max_model_len=6_000)
    with ServerThread(lambda: fake) as server:
        body = {"prompt_token_ids": [1], "max_tokens": None, "stream": True}
        with httpx.stream("POST", server.url + "/generate", json=body, timeout=DEADLINE) as response:
            chunks = response.iter_text()
            next(chunks)  # and reads no further until the engine is through
            wait_until(lambda: not fake.running, "the request has ended")
            assert httpx.post(server.url + "/generate", json={"prompt": "a"}).status_code == 200
            text = "".join(chunks)
        assert events_of(text)[-2]["usage"]["completion_tokens"] == 5_999


def test_the_port_is_bound_before_the_model_is_loaded(capsys):
    def make_engine():
        raise AssertionError("the model was loaded")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_server(make_engine, ServerConfig(port=port)) == 2
    captured = capsys.readouterr()
    message = f"port: {port} is already in use on 127.0.0.1; choose another with --port"
    assert captured.err == f"moe-runtime: error: {message}\n"


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 65536, "port: 65536 is not allowed; it must be from 0 to 65535"),
        ("192.0.2.1", 0, "host: '192.0.2.1' is no address of this machine"),
        ("no such host", 0, "host: 'no such host' is no address of this machine"),
    ],
)
def test_addresses_that_cannot_be_had(host, port, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bind(host, port, 60.0)


def test_it_says_when_it_is_ready_and_ends_cleanly():
    with ServerProcess() as server:
        line = server.ready_line()
        assert re.fullmatch(r"ready: http://127\.0\.0\.1:\d+ \(model fake-model, 2 ranks\)\n", line)
        assert httpx.get(line.split()[1] + "/health").json()["pid"] == server.process.pid
        server.process.send_signal(signal.SIGTERM)
        code, stdout, stderr = server.wait()
    assert (code, stdout) == (0, "")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains(number):
    with ServerProcess("FakeEngine(step_seconds=0.05)") as server:
        url = server.url()
        body = {"prompt": "a", "max_tokens": 20, "stream": True}
        with httpx.stream("POST", url + "/generate", json=body, timeout=DEADLINE) as response:
            chunks = response.iter_text()
            text = next(chunks)
            server.process.send_signal(number)
            wait_until(lambda: httpx.get(url + "/ready").status_code == 503, "the server drains")
            refused = httpx.post(url + "/generate", json={"prompt": "late"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
            text += "".join(chunks)
        *deltas, done = events_of(text)
        assert done == "[DONE]" and [token for delta in deltas for token in delta["token_ids"]] == list(range(2, 22))
        assert server.wait()[0] == 0


ENDLESS = "FakeEngine(step_seconds=0.05, max_model_len=10**6)"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGQUIT),
    ],
)
def test_a_second_signal_ends_at_once_and_leaves_no_folder(tmp_path, first, second):
    owned = "__import__('moe_runtime.system.owned_folders', fromlist=['']).make_own_folder"
    path = f"__import__('pathlib').Path({str(tmp_path)!r})"
    with ServerProcess(f"{owned}({path}, 'x-') and {ENDLESS}") as server:
        url = server.url()
        body = {"prompt": "a", "max_tokens": None, "stream": True}
        with httpx.stream("POST", url + "/generate", json=body, timeout=DEADLINE) as response:
            chunks = response.iter_text()  # httpx hangs up once this is gone
            next(chunks)
            assert list(tmp_path.iterdir())
            server.process.send_signal(first)
            wait_until(lambda: httpx.get(url + "/ready").status_code == 503, "the server drains")
            started_at = time.monotonic()
            server.process.send_signal(second)
            assert server.wait()[0] == 128 + second
    assert time.monotonic() - started_at < 10 and not list(tmp_path.iterdir())


def test_more_hangups_do_not_end_a_drain():
    """A terminal that closes sends more than one."""
    with ServerProcess("FakeEngine(step_seconds=0.02)") as server:
        url = server.url()
        body = {"prompt": "a", "max_tokens": 30, "stream": True}
        with httpx.stream("POST", url + "/generate", json=body, timeout=DEADLINE) as response:
            chunks = response.iter_text()
            text = next(chunks)
            for _ in range(3):
                server.process.send_signal(signal.SIGHUP)
                time.sleep(0.05)
            assert (text + "".join(chunks)).endswith("data: [DONE]\n\n")
        assert server.wait()[0] == 0


def test_a_quit_signal_ends_at_once():
    with ServerProcess(ENDLESS) as server:
        server.url()
        server.process.send_signal(signal.SIGQUIT)
        assert server.wait()[0] == 128 + signal.SIGQUIT


def test_nohup_is_respected():
    with ServerProcess(ENDLESS, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)") as server:
        url = server.url()
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert httpx.get(url + "/ready").status_code == 200


def test_a_wrong_file_of_keys_is_one_line(tmp_path):
    with ServerProcess(api_key_file=str(tmp_path / "none")) as server:
        message = f"api_key_file: '{tmp_path}/none' cannot be read (No such file or directory)"
        assert server.wait() == (2, "", f"moe-runtime: error: {message}\n")


@pytest.mark.parametrize(("host", "warns"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_warning_when_other_machines_can_reach_an_open_server(host, warns):
    with ServerProcess(host=host) as server:
        server.ready_line()
        server.process.terminate()
        stderr = server.wait()[2]
    assert ("host: 0.0.0.0 is open to other machines, and there is no --api-key-file" in stderr) == warns


def test_routes_have_deadlines_while_the_engine_is_stuck(monkeypatch):
    monkeypatch.setattr("moe_runtime.serve.async_engine.QUERY_SECONDS", 0.3)
    fake = FakeEngine(allow=threading.Semaphore(0))
    with ServerThread(lambda: fake) as server:
        body = {"prompt": "a", "max_tokens": 1}
        asking = threading.Thread(target=lambda: httpx.post(server.url + "/generate", json=body, timeout=DEADLINE))
        asking.start()
        wait_until(lambda: fake.added, "a step runs that does not end")
        reply = httpx.get(server.url + "/experts/load", timeout=DEADLINE)
        message = "the engine has not answered within 0.3 s; a rank may be stuck"
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, message)
        metrics = httpx.get(server.url + "/metrics", timeout=DEADLINE)
        assert metrics.status_code == 200 and "moe_runtime_steps_total" in metrics.text
        fake.allow.release(9)
        asking.join(DEADLINE)
        assert httpx.get(server.url + "/experts/load", timeout=DEADLINE).status_code == 200


def test_a_rank_that_dies_ends_the_server():
    with ServerProcess("FakeEngine(step_seconds=0.02, die_at=8)") as server:
        started_at = time.monotonic()
        response = httpx.post(server.url() + "/generate", json={"prompt": "a", "max_tokens": None}, timeout=DEADLINE)
        assert response.status_code == 503 and RANK_ERROR in response.json()["error"]["message"]
        code, _, stderr = server.wait()
        assert time.monotonic() - started_at < 10
    assert (code, stderr) == (1, f"moe-runtime: error: {RANK_ERROR}\n")


@pytest.mark.parametrize(
    ("engine", "code", "message"),
    [
        ("exec('raise ValueError(\"model: no checkpoint\")')", 2, "model: no checkpoint"),
        ("exec('raise RankError(\"rank 0 died\")')", 1, "rank 0 died"),
    ],
)
def test_a_model_that_cannot_be_loaded(engine, code, message):
    with ServerProcess(engine) as server:
        assert server.wait() == (code, "", f"moe-runtime: error: {message}\n")


def test_a_signal_while_the_model_loads():
    with ServerProcess("print('loading', flush=True) or time.sleep(60)") as server:
        assert server.ready_line() == "loading\n"
        server.process.send_signal(signal.SIGTERM)
        assert server.wait()[0] == 0
