"""Bodies of errors: one line, little of what the client sent, and described in `/openapi.json`."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_clients import DEFAULTS
from serve_fakes import FakeEngine

from moe_runtime.serve.app import create_app
from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.errors import ErrorBody, error_body, error_responses, shown, user_error

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=30), inner, max_size=9),
)


@given(st.integers(400, 499), st.text(max_size=2000), st.none() | st.text(max_size=300))
def test_a_clients_error_is_one_short_line(status, message, param):
    body = error_body(status, message, param)
    ErrorBody.model_validate(body, strict=True)
    found = body["error"]
    assert "\n" not in found["message"] and len(found["message"]) <= 240
    assert found["param"] is None or (found["param"] == param and len(param) <= 64)
    if len(message) <= 240:
        assert found["message"] == " ".join(message.split())


@given(st.text(alphabet="ab ", min_size=1000, max_size=2000))
def test_at_most_200_characters_of_a_long_value_are_sent(value):
    error = user_error(ValueError(f"field: {value!r} is not allowed; it must be a number"), {})
    message = error_body(error.status, str(error), error.param)["error"]["message"]
    assert message.startswith("field: ") and message.endswith("is not allowed; it must be a number")
    assert sum(map(message.count, "ab")) - sum(map("field is not allowed; it must be a number".count, "ab")) <= 200


def test_a_servers_error_is_sent_whole():
    message = "the engine has failed: " + "rank 1 " * 100
    assert error_body(503, message)["error"]["message"] == message.strip()


@given(VALUES)
def test_shown_values_are_short(value):
    text = shown(value)
    assert 0 < len(text) <= 83
    if isinstance(value, (bool, int)) and abs(value) < 10**9:
        assert text == repr(value)


def test_shown_values_may_be_deep():
    value = []
    for _ in range(200_000):
        value = [value]
    assert shown(value) == "[[[[[[[...]]]]]]]"
    while value:
        value = value.pop()  # freeing it by one recursion would end the process


@pytest.fixture(scope="module")
def schema():
    return json.loads(json.dumps(create_app(AsyncEngine(FakeEngine), DEFAULTS).openapi()))


def test_every_route_describes_its_errors(schema):
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            found = operation["responses"]
            assert {"400", "401", "413", "500", "503"} <= found.keys(), path
            for status in found.keys() - {"200"}:
                content = found[status]["content"]["application/json"]
                assert content == {"schema": {"$ref": "#/components/schemas/ErrorBody"}}


@pytest.mark.parametrize(
    ("path", "method", "statuses"),
    [
        ("/tokenize", "post", {"404"}),
        ("/detokenize", "post", {"404"}),
        ("/v1/models/{model_id}", "get", {"404"}),
        ("/experts/heatmap.{suffix}", "get", {"404"}),
        ("/experts/rebalance", "post", {"403", "409"}),
    ],
)
def test_routes_describe_errors_of_their_own(schema, path, method, statuses):
    found = schema["paths"][path][method]["responses"]
    assert statuses <= found.keys()
    for status in statuses:
        reference = found[status]["content"]["application/json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/ErrorBody"


def test_media_types(schema):
    def types(path):
        return set(schema["paths"][path]["get"]["responses"]["200"]["content"])

    assert types("/metrics") == {"text/plain"}
    pictures = {"image/png", "image/svg+xml", "text/html", "text/csv", "application/json", "application/octet-stream"}
    assert types("/experts/heatmap.{suffix}") == pictures
    assert types("/health") == {"application/json"}


def test_a_status_without_a_description_is_our_mistake():
    with pytest.raises(KeyError):
        error_responses(418)
