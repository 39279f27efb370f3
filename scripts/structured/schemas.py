"""Random JSON schemas of the kinds that function calls, forms, settings and API descriptions have."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
WORDS = ["name", "city", "size", "kind", "state", "price", "owner", "items", "total", "email", "from", "count", "tags"]
DEPTH = 3


def draw(rng: random.Random) -> Schema:
    """A schema of an object, whose definitions its parts may name."""
    schema = _object(rng, DEPTH)
    if rng.random() < 0.25:
        schema["$defs"] = {"Part": _object(rng, 1)}
        schema["properties"]["part"] = {"$ref": "#/$defs/Part"}
    return schema


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 6))
    schema: Schema = {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }
    if rng.random() < 0.1:
        schema["additionalProperties"] = {"type": "integer"}
    return schema


def _value(rng: random.Random, depth: int) -> Schema:
    kinds = [_string, _number, _choice, _boolean, _nullable]
    if depth > 0:
        kinds += [_object, _array, _union]
    return rng.choice(kinds)(rng, depth)


def _string(rng: random.Random, depth: int) -> Schema:
    limits: list[Schema] = [
        {"maxLength": rng.randint(3, 30)},
        {"minLength": 1, "maxLength": 20},
        {"pattern": "^[A-Z]{2,4}-[0-9]{1,6}$"},
        {"format": rng.choice(["date", "date-time", "uuid", "email", "ipv4"])},
    ]
    return {"type": "string", "description": "a text", **rng.choice(limits)}


def _number(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(-1000, 1000)
    kind: Schema = {"type": rng.choice(["integer", "number"])}
    bounds: list[Schema] = [{}, {"minimum": low}, {"minimum": low, "maximum": low + rng.randint(0, 5000)}]
    return kind | rng.choice(bounds)


def _choice(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample([*WORDS, 1, 2.5, None, True], rng.randint(2, 6))}


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": "boolean"}


def _nullable(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_string(rng, depth), {"type": "null"}]}


def _array(rng: random.Random, depth: int) -> Schema:
    size = {"minItems": rng.randint(0, 2), "maxItems": rng.randint(2, 4)}
    return {"type": "array", "items": _value(rng, depth - 1), **size}


def _union(rng: random.Random, depth: int) -> Schema:
    flags = {"type": "array", "items": _boolean(rng, 0), "maxItems": 3}
    return {"anyOf": [_object(rng, depth - 1), _number(rng, depth), flags]}
