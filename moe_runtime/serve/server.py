"""The server's lifecycle: bind the port, load the model, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn
from fastapi import FastAPI

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.access import is_loopback
from moe_runtime.serve.app import create_app
from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.connection import Connection, WebConfig
from moe_runtime.serve.limits import Bodies
from moe_runtime.serve.rendering import answer_format
from moe_runtime.serve.request_stream import UnavailableError
from moe_runtime.serve.warm_up import warm_up
from moe_runtime.system.owned_folders import remove_own_folders
from moe_runtime.system.signals import END_SIGNALS

if TYPE_CHECKING:
    from moe_runtime.engine.engine import Engine

DRAIN_SECONDS = 20.0
BACKLOG = 2048  # connections that wait until they are accepted
SEND_BUFFER = 128 * 1024  # bytes per connection that the kernel holds for a client; without a limit it is 4 MB
CLOSE_SECONDS = 3.0  # for the ranks to end; all together, less than the 25 s that a host allows the front
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

logger = logging.getLogger(__name__)


def run_server(make_engine: Callable[[], Engine], config: ServerConfig) -> int:
    """Serve HTTP until a signal or a failure. Returns the process's exit code.

    The port is bound first. Then the engine's thread makes the engine, while `/ready` returns 503. After SIGTERM,
    SIGINT or SIGHUP, new requests are refused and running ones have `DRAIN_SECONDS` to finish. SIGTERM or SIGINT after
    that, and SIGQUIT, end the process at once.

    Args:
        make_engine: may raise ValueError for the user's mistakes, and RankError.
        config: the server's options.

    Returns:
        0 after a clean stop, 1 if the engine failed, 2 for a mistake in the arguments or in what `make_engine` read.
    """
    try:
        app = create_app(AsyncEngine(make_engine), config)
        listener = bind(config.host, config.port, config.send_timeout)
    except ValueError as error:
        _complain(str(error))
        return EXIT_USAGE
    with listener:
        if config.api_key_file is None and not is_loopback(listener.getsockname()[0]):
            logger.warning("host: %s is open to other machines, and there is no --api-key-file", config.host)
        code, ended = asyncio.run(_serve_until_signal(app, listener))
    if not ended:
        # The engine's thread is loading or inside a step. Python cannot end it, and must not finalise while it runs.
        _exit_at_once(code)
    return code


def bind(host: str, port: int, send_timeout: float) -> socket.socket:
    """A listening socket. Raises ValueError with one line if the address cannot be bound.

    Args:
        send_timeout: seconds for which a client may leave data unread or unacknowledged; then the connection breaks.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port: {port} is not allowed; it must be from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        # Connections inherit these. Without the first, a reply of two writes waits 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * send_timeout))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        return listener
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port: {port} is already in use on {host}; choose another with --port") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ValueError(f"port: {port} is not allowed for this user; choose one above 1023 with --port") from error
        raise ValueError(f"host: {host!r} is no address of this machine ({error.strerror or error})") from error


async def serve(app: FastAPI, listener: socket.socket, stop: asyncio.Event) -> tuple[int, bool]:
    """Serve an application of `create_app` until `stop` is set or the engine fails.

    Returns:
        The exit code, and whether the engine's thread has ended.
    """
    engine: AsyncEngine = app.state.engine
    await warm_up(app)
    web = _WebServer(app)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(web.serve(sockets=[listener]))
        engine.start()
        stopping = tasks.create_task(stop.wait())
        stopping.add_done_callback(web.end_arrivals)
        code = await _watch(app, stopping, _url(listener))
        stopping.cancel()
        web.should_exit = True
    return code, await engine.close(CLOSE_SECONDS)


async def _serve_until_signal(app: FastAPI, listener: socket.socket) -> tuple[int, bool]:
    stop = asyncio.Event()
    with _stop_on_signals(stop):
        return await serve(app, listener, stop)


async def _watch(app: FastAPI, stopping: asyncio.Future[Any], url: str) -> int:
    """Wait until the server should end. Returns its exit code."""
    engine: AsyncEngine = app.state.engine
    await _first(engine.loaded, stopping)
    if engine.loaded.done():
        try:
            info = engine.loaded.result()
            written = answer_format(app.state, info, app.state.server_config).format
        except ValueError as error:
            _complain(str(error))
            return EXIT_USAGE
        except UnavailableError as error:
            _complain(str(error))
            return EXIT_FAILED
        ep_size = info.config.ep_size
        ranks = "1 rank" if ep_size == 1 else f"{ep_size} ranks"
        logger.info(
            "format of chats: tool calls %s, reasoning %s",
            written.tool_format or "are not looked for",
            written.reasoning_format or "is not looked for",
        )
        print(f"ready: {url} (model {info.model_name}, {ranks})", flush=True)
        await _first(engine.died, stopping)
        if stopping.done():
            logger.info("stopping: running requests have %g s to finish; a second signal ends at once", DRAIN_SECONDS)
            if num_aborted := await engine.drain(DRAIN_SECONDS):
                logger.warning("aborted %d requests that had not finished", num_aborted)
        if engine.died.done():
            _complain(engine.died.result())
            return EXIT_FAILED
    return EXIT_OK


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` on the first signal to end. After that, SIGTERM and SIGINT end the process at once; SIGQUIT always."""
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        # A terminal that closes sends more than one SIGHUP.
        if number == signal.SIGQUIT or (stop.is_set() and number != signal.SIGHUP):
            _exit_at_once(128 + number)
        stop.set()

    numbers = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup sets it
    for number in numbers:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _exit_at_once(code: int) -> NoReturn:
    """End the process without waiting for anything. The ranks end when they see that it is gone."""
    remove_own_folders()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _WebServer(uvicorn.Server):
    """A uvicorn server that leaves signals to `_stop_on_signals`."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(WebConfig(app))
        self._bodies: Bodies = app.state.bodies

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # uvicorn has set the number of connections that asyncio accepts at one time

    def end_arrivals(self, _: object) -> None:
        """Wait no longer for headers and bodies that have not arrived completely."""
        for connection in list(self.server_state.connections):
            assert isinstance(connection, Connection)
            connection.close_half_open()
        self._bodies.end()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _complain(message: str) -> None:
    print(f"moe-runtime: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
