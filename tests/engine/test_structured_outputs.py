"""Structured outputs: valid, and the same tokens for any number of ranks, batch and after preemption."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engines import WAYS, Pools, in_bytes, possible, tokens
from fakes import save_byte_tokenizer
from rank_pool import PoolExecutor
from tiny_models import make_model, save

from moe_runtime.build import build_engine
from moe_runtime.config.engine import EngineConfig
from moe_runtime.engine.engine import Engine
from moe_runtime.types.outputs import OutputDelta
from moe_runtime.types.sampling_params import SamplingParams

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": -99, "maximum": 99},
        "kind": {"enum": ["sea", "lake"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any] | None] = [
    {"json": SCHEMA},
    None,
    {"regex": "(ab|c){3,6}-[0-9]{2}"},
    {"choice": ["yes", "no", "yes, but"]},
    {"json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    {"grammar": 'root ::= "x" [a-c]+ "y" | "z"'},
    None,
]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    tokenizer = save_byte_tokenizer(tmp_path)
    model = make_model("qwen3", vocab_size=tokenizer.vocab_size + 5, eos_token_id=0)
    save(model, tmp_path)
    return model


@contextmanager
def text_engine(pools: Pools, path: Path, ep_size: int, **options: Any) -> Iterator[Engine]:
    config = EngineConfig(str(path), ep_size=ep_size, device="cpu", dtype="float32", **options)
    made = build_engine(config, lambda config, model, where: PoolExecutor(pools(ep_size), config, model, where))
    try:
        yield made
    finally:
        made.close()


def outputs(made: Engine, forms: list[dict[str, Any] | None], seed: int) -> list[list[OutputDelta]]:
    """The deltas of one request for each form, run together."""
    for index, form in enumerate(forms):
        params = SamplingParams(temperature=1.0, max_tokens=40, seed=seed + index, structured_outputs=form)
        made.add_request(str(index), "the sea", params)
    found: list[list[OutputDelta]] = [[] for _ in forms]
    while made.has_work:
        for delta in made.step():
            found[int(delta.request_id)].append(delta)
    return found


def check(form: dict[str, Any] | None, text: str) -> None:
    """Whether a finished output has its form."""
    match form:
        case {"json": schema}:
            jsonschema.validate(json.loads(text), schema)
        case {"regex": regex}:
            assert re.fullmatch(regex, text)
        case {"choice": choice}:
            assert text in choice
        case {"grammar": _}:
            assert re.fullmatch("x[abc]+y|z", text)


def test_outputs_are_valid_and_the_same_in_every_way(rank_pool: Pools, tmp_path: Path, model: Any) -> None:
    expected: list[list[int]] = []
    finished = 0
    for name, (ep_size, options) in possible(WAYS).items():
        with text_engine(rank_pool, tmp_path, ep_size, **in_bytes(options, model)) as made:
            found = [outputs(made, FORMS, seed) for seed in (5, 77)]
            assert name != "one rank, preempted" or made.stats().num_preemptions
        for deltas_of in found:
            for form, deltas in zip(FORMS, deltas_of, strict=True):
                if deltas[-1].finish_reason == "stop":
                    finished += form is not None
                    check(form, "".join(delta.text for delta in deltas))
        ids = [tokens(deltas) for deltas_of in found for deltas in deltas_of]
        expected = expected or ids
        assert ids == expected, name
    assert finished


def test_rows_without_a_form_are_as_if_they_were_alone(rank_pool: Pools, tmp_path: Path, model: Any) -> None:
    with text_engine(rank_pool, tmp_path, 1) as made:
        together = outputs(made, FORMS, 9)
        for index, form in enumerate(FORMS):
            if form is None:
                assert tokens(outputs(made, [None], 9 + index)[0]) == tokens(together[index])


def test_greedy_rows_and_limits(rank_pool: Pools, tmp_path: Path, model: Any) -> None:
    """A form wins over `min_tokens`; what a limit cuts off ends with "length"."""
    with text_engine(rank_pool, tmp_path, 1) as made:
        long = SamplingParams(temperature=0, min_tokens=20, max_tokens=30, structured_outputs={"choice": ["no"]})
        short = SamplingParams(temperature=0, max_tokens=3, structured_outputs={"regex": "[a-z]{40}"})
        made.add_request("long", "a", long)
        made.add_request("short", "a", short)
        ends: dict[str, tuple[str, str]] = {}
        texts = {"long": "", "short": ""}
        while made.has_work:
            for delta in made.step():
                texts[delta.request_id] += delta.text
                if delta.finish_reason:
                    ends[delta.request_id] = (texts[delta.request_id], delta.finish_reason)
        assert ends["long"] == ("no", "stop")
        assert ends["short"][1] == "length" and re.fullmatch("[a-z]{3,40}", ends["short"][0])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "strin"}}, "Invalid type"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"$ref": "http://example.com/x"}}, "http://example.com/x"),
        ({"json": "{"}, "not JSON"),
        ({"json": [1]}, "a JSON schema"),
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"choice": []}, "exactly one of"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of"),
        ({"form": "a"}, "an object with one of json"),
        ({"within": "start: @answer", "regex": "a"}, "an object with one of json"),
        ({"regex": "a" * 200_000}, "at most 131072 characters"),
        ({"json": False}, "exactly one of"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(
    rank_pool: Pools, tmp_path: Path, model: Any, form: Any, message: str
) -> None:
    with (
        text_engine(rank_pool, tmp_path, 1) as made,
        pytest.raises(ValueError, match="structured_outputs: ") as found,
    ):
        made.add_request("a", "b", SamplingParams(structured_outputs=form))
    assert message in str(found.value)


def test_what_does_not_go_together(rank_pool: Pools, tmp_path: Path, model: Any) -> None:
    with pytest.raises(ValueError, match="ignore_eos: true is not allowed with structured_outputs"):
        SamplingParams(ignore_eos=True, structured_outputs={"regex": "a"})
    with (
        text_engine(rank_pool, tmp_path, 1, skip_tokenizer_init=True) as made,
        pytest.raises(ValueError, match="structured_outputs: a tokenizer is needed"),
    ):
        made.add_request("a", [1], SamplingParams(structured_outputs={"regex": "a"}))
