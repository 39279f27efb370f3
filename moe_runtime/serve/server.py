"""The server's lifecycle: bind the port, load the model, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve.app import create_app
from moe_runtime.serve.async_engine import AsyncEngine, UnavailableError

if TYPE_CHECKING:
    from moe_runtime.engine.engine import Engine

DRAIN_SECONDS = 20.0
RESPONSE_SECONDS = 2  # for complete replies and errors to reach their clients
CLOSE_SECONDS = 3.0  # for the ranks to end; all together, less than the 25 s that a host allows the front
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

logger = logging.getLogger(__name__)


def run_server(make_engine: Callable[[], Engine], config: ServerConfig) -> int:
    """Serve HTTP until a signal or a failure. Returns the process's exit code.

    The port is bound first. Then the engine's thread makes the engine, while `/ready` returns 503. After SIGTERM or
    SIGINT, new requests are refused and running ones have `DRAIN_SECONDS` to finish. A second SIGINT ends at once.

    Args:
        make_engine: may raise ValueError for the user's mistakes, and RankError.
        config: the server's options.

    Returns:
        0 after a clean stop, 1 if the engine failed, 2 for a mistake in the arguments or in what `make_engine` read.
    """
    try:
        listener = bind(config.host, config.port)
    except ValueError as error:
        _complain(str(error))
        return EXIT_USAGE
    with listener:
        code, ended = asyncio.run(_serve_until_signal(make_engine, listener, config))
    if not ended:
        # The engine's thread is loading or inside a step. Python cannot end it, and must not finalise while it runs.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError with one line if the address cannot be bound."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port: {port} is not allowed; it must be from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port: {port} is already in use on {host}; choose another with --port") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ValueError(f"port: {port} is not allowed for this user; choose one above 1023 with --port") from error
        raise ValueError(f"host: {host!r} is no address of this machine ({error.strerror or error})") from error


async def serve(
    make_engine: Callable[[], Engine], listener: socket.socket, stop: asyncio.Event, config: ServerConfig
) -> tuple[int, bool]:
    """Serve until `stop` is set or the engine fails.

    Returns:
        The exit code, and whether the engine's thread has ended.
    """
    engine = AsyncEngine(make_engine)
    web = _WebServer(
        uvicorn.Config(
            create_app(engine, config),
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=RESPONSE_SECONDS,
        )
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(web.serve(sockets=[listener]))
        engine.start()
        stopping = tasks.create_task(stop.wait())
        code = await _watch(engine, stopping, _url(listener))
        stopping.cancel()
        web.should_exit = True
    return code, await engine.close(CLOSE_SECONDS)


async def _serve_until_signal(
    make_engine: Callable[[], Engine], listener: socket.socket, config: ServerConfig
) -> tuple[int, bool]:
    stop = asyncio.Event()
    with _stop_on_signals(stop):
        return await serve(make_engine, listener, stop, config)


async def _watch(engine: AsyncEngine, stopping: asyncio.Future[Any], url: str) -> int:
    """Wait until the server should end. Returns its exit code."""
    await _first(engine.loaded, stopping)
    if engine.loaded.done():
        try:
            info = engine.loaded.result()
        except ValueError as error:
            _complain(str(error))
            return EXIT_USAGE
        except UnavailableError as error:
            _complain(str(error))
            return EXIT_FAILED
        ep_size = info.config.ep_size
        ranks = "1 rank" if ep_size == 1 else f"{ep_size} ranks"
        print(f"ready: {url} (model {info.model_name}, {ranks})", flush=True)
        await _first(engine.died, stopping)
        if stopping.done():
            logger.info("stopping: running requests have %g s to finish; Ctrl-C again ends at once", DRAIN_SECONDS)
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
    """Set `stop` on SIGTERM and SIGINT; a SIGINT after that ends the process at once."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if stop.is_set():
            os._exit(128 + signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)


class _WebServer(uvicorn.Server):
    """A uvicorn server that leaves signals to `_stop_on_signals`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _complain(message: str) -> None:
    print(f"moe-runtime: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
