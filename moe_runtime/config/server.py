"""The HTTP server's options, as the user sets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_runtime.config.checks import check_integer, is_number

MIB = 2**20
COUNTS = (
    "max_body_bytes",
    "max_bytes_under_way",
    "max_connections",
    "max_prompts_per_request",
    "max_choices",
    "max_stop_strings",
    "max_stop_chars",
    "max_logit_bias",
    "max_tools",
)


@dataclass(frozen=True)
class ServerConfig:
    """The server's options. They have the same names as command-line flags and keys of a YAML file.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        api_key_file: file with one key a line, of which a request must send one; None lets everybody in.
        admin_key_file: the same for requests that change the server; None lets clients of this machine do that.
        cors_origin: origin whose web pages may send requests, such as https://example.org, or * for all.
        max_body_bytes: maximum bytes of a request's body.
        max_bytes_under_way: maximum bytes of the bodies of all requests that run at one time.
        max_connections: maximum connections that are open at one time; the limit of open files may lower it.
        max_prompts_per_request: maximum prompts of one request.
        max_choices: maximum choices that one request may ask for (n).
        max_stop_strings: maximum stop strings of one request.
        max_stop_chars: maximum characters of one stop string.
        max_logit_bias: maximum tokens in a request's logit_bias.
        max_tools: maximum tools of one request.
        header_timeout: seconds within which a request's header must arrive.
        body_timeout: seconds within which a request's body must arrive.
        send_timeout: seconds without progress after which a connection is closed whose client does not read.
        request_timeout: seconds within which a request must be answered completely; None sets no limit.
        tool_call_parser: how tool calls are found in a model's output; "auto" derives it from the model.
        reasoning_parser: how reasoning is found in a model's output; "auto" derives it from the model.
        escape_special_tokens: read control tokens in the content of messages as plain text.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    admin_key_file: str | None = None
    cors_origin: Sequence[str] = ()
    max_body_bytes: int = 32 * MIB
    max_bytes_under_way: int = 256 * MIB
    max_connections: int = 4096
    max_prompts_per_request: int = 1024
    max_choices: int = 128
    max_stop_strings: int = 64
    max_stop_chars: int = 1024
    max_logit_bias: int = 1024
    max_tools: int = 128
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    request_timeout: float | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    escape_special_tokens: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise ValueError(f"host: {self.host!r} is not allowed; it must be an address or name of this machine")
        check_integer("port", self.port, 0)
        for name in COUNTS:
            check_integer(name, getattr(self, name), 1)
        if self.max_bytes_under_way < self.max_body_bytes:
            raise ValueError(
                f"max_bytes_under_way: {self.max_bytes_under_way} is not allowed; "
                f"it must be at least max_body_bytes ({self.max_body_bytes})"
            )
        for name in ("header_timeout", "body_timeout", "send_timeout", "request_timeout"):
            value = getattr(self, name)
            if not (value is None and name == "request_timeout") and not (is_number(value) and value > 0):
                raise ValueError(f"{name}: {value!r} is not allowed; it must be a number of seconds above 0")
        for name in ("api_key_file", "admin_key_file"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}: {value!r} is not allowed; it must be the name of a file")
        for name in ("tool_call_parser", "reasoning_parser"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; it must be a non-empty string")
        if not isinstance(self.escape_special_tokens, bool):
            raise ValueError(
                f"escape_special_tokens: {self.escape_special_tokens!r} is not allowed; it must be true or false"
            )
        object.__setattr__(self, "cors_origin", _origins(self.cors_origin))


def _origins(value: object) -> tuple[str, ...]:
    origins = value if isinstance(value, (list, tuple)) else None
    if origins is None or not all(isinstance(origin, str) and _is_origin(origin) for origin in origins):
        raise ValueError(
            f'cors_origin: {value!r} is not allowed; it must be a list of origins such as "https://example.org", or "*"'
        )
    return tuple(origins)


def _is_origin(text: str) -> bool:
    scheme, separator, host = text.partition("://")
    return text == "*" or bool(scheme and separator and host and "/" not in host)
