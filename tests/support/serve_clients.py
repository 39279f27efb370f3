"""Ways to reach the application in tests: in this event loop, or over a socket, with a server thread or process."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
from serve_fakes import DEADLINE, FakeEngine, wait_until

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.app import create_app
from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.server import serve

HERE = Path(__file__).parent
DEFAULTS = ServerConfig()


def run(coroutine):
    """The result of a coroutine, within the deadline."""
    return asyncio.run(asyncio.wait_for(coroutine, DEADLINE))


@contextlib.asynccontextmanager
async def started(fake=None):
    """An AsyncEngine over a fake engine, loaded."""
    engine = AsyncEngine(lambda: fake or FakeEngine())
    engine.start()
    await engine.loaded
    try:
        yield engine
    finally:
        assert await engine.close(DEADLINE)


@contextlib.asynccontextmanager
async def client_of(engine, server_config=DEFAULTS):
    """An httpx client of the application over an engine, without a socket."""
    transport = httpx.ASGITransport(create_app(engine, server_config), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=DEADLINE) as client:
        yield client


def events_of(text):
    """The events of a stream: JSON values, the last one "[DONE]" as it is."""
    assert text.endswith("\n\n")
    data = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
    return [event if event == "[DONE]" else json.loads(event) for event in data]


class ServerThread:
    """A real server on a free port of the loopback, in a thread of this process."""

    def __init__(self, make_engine, server_config=DEFAULTS):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.result = None
        self._make_engine = make_engine
        self._server_config = server_config
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = create_app(AsyncEngine(self._make_engine), self._server_config)
        self.result = await serve(app, self.listener, self._stop)

    def __enter__(self):
        self._thread.start()
        wait_until(lambda: httpx.get(self.url + "/ready").status_code == 200, "the server is ready")
        return self

    def __exit__(self, *exception):
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self.wait()

    def wait(self):
        """The exit code, and whether the engine's thread ended."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        return self.result


class ServerProcess:
    """`run_server` over a fake engine in a process of its own."""

    def __init__(self, engine="FakeEngine()", port=0, before="", **options):
        program = (
            "import sys; from serve_fakes import *; from moe_runtime.config.server import ServerConfig\n"
            "from moe_runtime.serve.server import run_server\n"
            f"{before}\ndef make_engine(): return {engine}\n"
            f"sys.exit(run_server(make_engine, ServerConfig(port={port}, **{options!r})))"
        )
        path = os.pathsep.join([str(HERE), str(HERE.parent)])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()

    def ready_line(self):
        """Waits for the line with the address of the server."""
        return self.process.stdout.readline()

    def url(self):
        return self.ready_line().split()[1]

    def wait(self):
        """Exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, stdout, stderr
