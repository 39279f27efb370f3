"""Who may use which route: API keys, the admin's keys, and what is open to everybody."""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from moe_runtime.serve.errors import ApiError, error_response
from moe_runtime.serve.keys import KeyFile, key_identity

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/version", "/docs", "/redoc", "/openapi.json"})
ADMIN_PATHS = frozenset({"/experts/rebalance", "/reset_prefix_cache"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Access:
    """Refuses requests that may not use their route, before anything else is done with them.

    The state of a request that passes has `key`, the identity of the key that let it pass or "", and `is_limited`:
    there are API keys, and it has no admin key.

    Args:
        api_keys: None lets everybody use the routes that change nothing.
        admin_keys: they open all routes. None lets clients of this machine use those that change the server.
    """

    def __init__(self, app: ASGIApp, api_keys: KeyFile | None, admin_keys: KeyFile | None) -> None:
        self._app = app
        self._api_keys = api_keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] != "OPTIONS":  # which runs nothing
                self._check(scope)
        except ApiError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            await error_response(error.status, str(error), headers=headers)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        state = scope.setdefault("state", {})
        state.update(key="", is_limited=False)
        if scope["path"] in OPEN_PATHS:
            return
        key = _bearer(scope)
        if key is not None and self._admin_keys is not None and self._admin_keys.accepts(key):
            state["key"] = key_identity(key)
            return
        if scope["path"] in ADMIN_PATHS:
            if self._admin_keys is not None:
                raise _unauthorized(key, "admin keys")
            _check_is_local(scope)
        if self._api_keys is not None:
            if key is None or not self._api_keys.accepts(key):
                raise _unauthorized(key, "keys")
            state.update(key=key_identity(key), is_limited=True)


def _bearer(scope: Scope) -> bytes | None:
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _unauthorized(key: bytes | None, kind: str) -> ApiError:
    if key is None:
        return ApiError(401, f'Authorization: missing; it must be "Bearer" and one of the server\'s {kind}')
    return ApiError(401, f"Authorization: the key is not one of the server's {kind}")


def _check_is_local(scope: Scope) -> None:
    """Without an admin key: the client must be on this machine, and not act for a web page of another origin."""
    if not is_loopback((scope.get("client") or ("",))[0]):
        raise ApiError(403, "this route needs a client on the server's machine, or an admin key (--admin-key-file)")
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    if origin is None:
        return
    host = headers.get(b"host", b"").decode("latin-1")
    name = re.sub(r":\d+$", "", host)
    # The page of another site may reach this machine under that site's name, so the name must be one of this machine's.
    if origin.decode("latin-1") != f"{scope['scheme']}://{host}" or name not in LOOPBACK_NAMES:
        raise ApiError(403, "this route takes no requests from web pages of another origin without an admin key")


def is_loopback(address: str) -> bool:
    """Whether an IP address is one of the loopback's."""
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped.is_loopback
    return found.is_loopback
