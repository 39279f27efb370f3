"""The application answers a request for each route before the engine starts; nothing of it is counted."""

from serve_clients import DEFAULTS, ServerThread, run
from serve_fakes import FakeEngine

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve import warm_up as module
from moe_runtime.serve.app import create_app
from moe_runtime.serve.async_engine import AsyncEngine


def statuses_of(server_config):
    """The status of the reply to each request of a warm-up."""
    app = create_app(AsyncEngine(FakeEngine), server_config)
    found = {}

    async def watched(scope, receive, send):
        async def watched_send(message):
            if "status" in message:
                found[scope["path"]] = message["status"]
            await send(message)

        await app(scope, receive, watched_send)

    run(module.warm_up(watched))
    return found


def test_each_route_of_a_client_validates_a_body():
    assert statuses_of(DEFAULTS) == dict.fromkeys(module.REQUESTS, 503)


def test_keys_need_no_exception(tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    config = ServerConfig(api_key_file=str(tmp_path / "keys"))
    assert statuses_of(config) == dict.fromkeys(module.REQUESTS, 401)


def test_a_server_is_ready_once_the_engine_is_warm_and_has_run_nothing():
    fake = FakeEngine()
    with ServerThread(lambda: fake):
        assert fake.is_warm and fake.added == []
