"""Hardware profiles as files: YAML or JSON, every value with its source; docs/planner.md lists the fields."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from moe_runtime.planner.hardware import COPIES, Hardware, Link, Overheads, Table
from moe_runtime.planner.shape import DTYPES

PROFILES = resources.files("moe_runtime.planner") / "profiles"
PLAIN = (
    "ranks_per_node",
    "memory_bytes",
    "reserved_bytes",
    "expert_bandwidth",
    "attention_bandwidth",
    "attention_rate",
    "attention_dtype",
    "output_multiple",
    "rows_out",
    "rows_back",
    "overlap",
)


def load_hardware(name: str) -> Hardware:
    """A profile of the package ("h200", "h800", "cpu"), or a YAML or JSON file.

    Raises:
        ValueError: no such profile, or one that is not well formed; the message names the field.
    """
    known = sorted(entry.name.removesuffix(".yaml") for entry in PROFILES.iterdir() if entry.name.endswith(".yaml"))
    if name in known:
        return parse_hardware((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"), name)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"hardware: {name!r} is not allowed; it must be a file or one of {known}")
    try:
        return parse_hardware(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hardware: {name!r} cannot be read ({error})") from error


def parse_hardware(text: str, where: str) -> Hardware:
    """The profile in a YAML (or JSON) text; `where` names its source in errors.

    Raises:
        ValueError: as `load_hardware`.
    """
    import yaml

    try:
        content = _parse_json_or_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"hardware: {where!r} is not YAML ({' '.join(str(error).split())})") from error
    try:
        return _build(_Reader(content))
    except ValueError as error:
        raise ValueError(f"hardware: {where!r}: {error}") from None


def _parse_json_or_yaml(text: str) -> Any:
    """Try JSON first: not all JSON is valid YAML, which would read 1e-05 as a string."""
    import yaml

    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def save_hardware(hardware: Hardware, path: Path) -> None:
    """Write the profile as JSON or YAML, according to the suffix.

    Raises:
        ValueError: another suffix.
    """
    import yaml

    if path.suffix == ".json":
        path.write_text(json.dumps(hardware_to_dict(hardware), indent=1) + "\n", encoding="utf-8")
    elif path.suffix in (".yaml", ".yml"):
        text = yaml.safe_dump(hardware_to_dict(hardware), sort_keys=False, width=120, allow_unicode=True)
        path.write_text(text, encoding="utf-8")
    else:
        raise ValueError(f"output: {str(path)!r} is not allowed; it must end in .yaml, .yml or .json")


def hardware_to_dict(hardware: Hardware) -> dict[str, Any]:
    """The profile in the form that `parse_hardware` reads."""

    def entry(where: str, value: Any) -> dict[str, Any]:
        return {"value": value, "source": hardware.sources.get(where, "")}

    def rows(table: Table) -> dict[float, float]:
        return {int(x) if x == int(x) else x: y for x, y in table}

    found: dict[str, Any] = {"name": hardware.name, "cores": hardware.cores}
    for name in PLAIN:
        found[name] = entry(name, getattr(hardware, name))
    if hardware.weight_bytes:
        sizes = hardware.weight_bytes.items()
        found["weight_bytes"] = {dtype: entry(f"weight_bytes.{dtype}", size) for dtype, size in sizes}
    for name in ("memory_bandwidth", "cold_factor"):
        found[name] = entry(name, rows(getattr(hardware, name)))
    for name in ("matrix_rate", "efficiency"):
        tables = getattr(hardware, name)
        found[name] = {dtype: entry(f"{name}.{dtype}", rows(table)) for dtype, table in tables.items()}
    for name in ("intra_node", "inter_node", "overheads"):
        part = getattr(hardware, name)
        found[name] = {key: entry(f"{name}.{key}", value) for key, value in vars(part).items()}
    return found


class _Reader:
    """Reads a profile's content field by field, so that errors name missing, unknown and wrong fields."""

    def __init__(self, content: object) -> None:
        if not isinstance(content, Mapping):
            raise ValueError(f"a {type(content).__name__} is not allowed; it must be a mapping of fields")
        self.content = content
        self.sources: dict[str, str] = {}
        self.seen: set[str] = set()

    def section(self, name: str) -> Mapping[str, Any]:
        self.seen.add(name)
        value = self.content.get(name)
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"{name}: {value!r} is not allowed; it must be a mapping")
        return value

    def value(self, where: str, entry: object) -> Any:
        """The value of `{value: ..., source: ...}`."""
        if not isinstance(entry, Mapping) or set(entry) != {"value", "source"} or not isinstance(entry["source"], str):
            raise ValueError(f"{where}: {entry!r} is not allowed; it must be {{value: ..., source: TEXT}}")
        self.sources[where] = entry["source"]
        return entry["value"]

    def field(self, name: str) -> Any:
        self.seen.add(name)
        return self.value(name, self.content.get(name))

    def finish(self) -> None:
        unknown = sorted(str(name) for name in self.content if name not in self.seen)
        if unknown:
            raise ValueError(f"{unknown[0]}: no such field; the fields are {sorted(self.seen)}")


def _build(reader: _Reader) -> Hardware:
    reader.seen |= {"name", "cores", "weight_bytes"}
    name, cores = reader.content.get("name"), reader.content.get("cores")
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: {name!r} is not allowed; it must be a string")
    intra, inter, rest = (reader.section(part) for part in ("intra_node", "inter_node", "overheads"))
    found = Hardware(
        name=name,
        cores=None if cores is None else _integer("cores", cores),
        ranks_per_node=_integer("ranks_per_node", reader.field("ranks_per_node")),
        memory_bytes=_number("memory_bytes", reader.field("memory_bytes")),
        reserved_bytes=_number("reserved_bytes", reader.field("reserved_bytes"), zero=True),
        weight_bytes=_weight_bytes(reader),
        memory_bandwidth=_table("memory_bandwidth", reader.field("memory_bandwidth")),
        expert_bandwidth=_number("expert_bandwidth", reader.field("expert_bandwidth"), most=1.0),
        matrix_rate=_tables(reader, "matrix_rate"),
        efficiency=_tables(reader, "efficiency"),
        attention_bandwidth=_number("attention_bandwidth", reader.field("attention_bandwidth"), most=1.0),
        attention_rate=_number("attention_rate", reader.field("attention_rate"), most=1.0),
        attention_dtype=_choice("attention_dtype", reader.field("attention_dtype"), DTYPES),
        output_multiple=_integer("output_multiple", reader.field("output_multiple")),
        intra_node=_link(reader, "intra_node", intra),
        inter_node=_link(reader, "inter_node", inter),
        rows_out=_choice("rows_out", reader.field("rows_out"), COPIES),
        rows_back=_choice("rows_back", reader.field("rows_back"), COPIES),
        overlap=_choice("overlap", reader.field("overlap"), (1, 2)),
        cold_factor=_table("cold_factor", reader.field("cold_factor"), zero=True),
        overheads=Overheads(**_numbers(reader, "overheads", rest, tuple(Overheads.__annotations__), zero=True)),
        sources=reader.sources,
    )
    reader.finish()
    for dtype, table in found.efficiency.items():
        if any(y > 1 for _, y in table):
            raise ValueError(f"efficiency.{dtype}: a share above 1 is not allowed; it must be at most 1")
        times = [x / y for x, y in table]
        if any(late < early * (1 - 1e-9) for early, late in itertools.pairwise(times)):
            raise ValueError(f"efficiency.{dtype}: a share is not allowed; rows / share must not fall with more rows")
    cold = [1.0, *(factor for _, factor in found.cold_factor)]
    if any(late < early for early, late in itertools.pairwise(cold)):
        raise ValueError("cold_factor: a factor is not allowed; it must be at least 1 and at least the one before it")
    found.table_of(found.matrix_rate, found.attention_dtype)
    return found


def _link(reader: _Reader, name: str, section: Mapping[str, Any]) -> Link:
    values = _numbers(reader, name, section, ("bandwidth", "latency"), zero=True)
    if not values["bandwidth"]:
        raise ValueError(f"{name}.bandwidth: 0 is not allowed; it must be a number above 0")
    return Link(**values)


def _numbers(
    reader: _Reader, name: str, section: Mapping[str, Any], keys: tuple[str, ...], zero: bool
) -> dict[str, float]:
    if set(section) != set(keys):
        raise ValueError(f"{name}: the fields {sorted(map(str, section))} are not allowed; they must be {sorted(keys)}")
    return {key: _number(f"{name}.{key}", reader.value(f"{name}.{key}", section[key]), zero=zero) for key in keys}


def _weight_bytes(reader: _Reader) -> dict[str, float]:
    """Bytes per weight by dtype; the field is optional."""
    name = "weight_bytes"
    section = reader.section(name) if name in reader.content else {}
    return {
        _choice(name, dtype, DTYPES): _number(f"{name}.{dtype}", reader.value(f"{name}.{dtype}", entry))
        for dtype, entry in section.items()
    }


def _tables(reader: _Reader, name: str) -> dict[str, Table]:
    section = reader.section(name)
    return {
        _choice(name, dtype, DTYPES): _table(f"{name}.{dtype}", reader.value(f"{name}.{dtype}", entry))
        for dtype, entry in section.items()
    }


def _table(where: str, value: object, zero: bool = False) -> Table:
    """A number, or a mapping from positive numbers (`zero`: or 0) to numbers, sorted by key."""
    if not isinstance(value, Mapping):
        return ((1.0, _number(where, value)),)
    if not value:
        raise ValueError(f"{where}: an empty table is not allowed; it must have an entry")
    entries = []
    for x, y in value.items():
        try:
            at = float(x)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {x!r} is not allowed; keys must be numbers") from None
        entries.append((_number(where, at, zero=zero), _number(where, y)))
    return tuple(sorted(entries))


def _number(name: str, value: Any, zero: bool = False, most: float = math.inf) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and value <= most and (value > 0 or (zero and value == 0)):
        return float(value)
    least = "of at least 0" if zero else "above 0"
    limit = "" if most == math.inf else f" and at most {most:g}"
    raise ValueError(f"{name}: {value!r} is not allowed; it must be a number {least}{limit}")


def _integer(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be an integer of at least 1")
    return value


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be one of {list(allowed)}")
    return value
