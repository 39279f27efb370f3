import re

import pytest

from moe_runtime.config.server import COUNTS, ServerConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": ""}, "host: '' is not allowed; it must be an address or name of this machine"),
        ({"port": -1}, "port: -1 is not allowed; it must be an integer of at least 0"),
        *(({name: 0}, f"{name}: 0 is not allowed; it must be an integer of at least 1") for name in COUNTS),
        ({"max_tools": True}, "max_tools: True is not allowed; it must be an integer of at least 1"),
        (
            {"max_body_bytes": 10, "max_bytes_under_way": 9},
            "max_bytes_under_way: 9 is not allowed; it must be at least max_body_bytes (10)",
        ),
        ({"header_timeout": None}, "header_timeout: None is not allowed; it must be a number of seconds above 0"),
        ({"send_timeout": -1}, "send_timeout: -1 is not allowed; it must be a number of seconds above 0"),
        ({"body_timeout": 0}, "body_timeout: 0 is not allowed; it must be a number of seconds above 0"),
        ({"request_timeout": "1"}, "request_timeout: '1' is not allowed; it must be a number of seconds above 0"),
        ({"request_timeout": float("nan")}, "request_timeout: nan is not allowed"),
        ({"api_key_file": 5}, "api_key_file: 5 is not allowed; it must be the name of a file"),
        ({"tool_call_parser": ""}, "tool_call_parser: '' is not allowed; it must be a non-empty string"),
        ({"escape_special_tokens": 1}, "escape_special_tokens: 1 is not allowed; it must be true or false"),
        ({"cors_origin": "https://a.example"}, "cors_origin: 'https://a.example' is not allowed; it must be a list"),
        ({"cors_origin": ["a.example"]}, "cors_origin: ['a.example'] is not allowed"),
        ({"cors_origin": ["https://a.example/"]}, "cors_origin: ['https://a.example/'] is not allowed"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ServerConfig(**options)


def test_right_values():
    assert ServerConfig(request_timeout=1).request_timeout == 1
    assert ServerConfig(cors_origin=["*", "https://a.example:8443"]).cors_origin == ("*", "https://a.example:8443")
