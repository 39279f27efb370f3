"""Hardware profiles: the package's own profiles, valid files, and invalid files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.planner.hardware import interpolate
from moe_runtime.planner.hardware_file import PROFILES, hardware_to_dict, load_hardware, parse_hardware, save_hardware
from moe_runtime.planner.shape import Matrix

NAMES = ["cpu", "h200", "h800"]


def content(name: str = "cpu") -> dict:
    return yaml.safe_load((PROFILES / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_profile_names_its_source(name):
    hardware = load_hardware(name)

    def leaves(found: dict, where: str = "") -> dict:
        if set(found) == {"value", "source"}:
            return {where: found["source"]}
        nested = {f"{where}.{key}".lstrip("."): entry for key, entry in found.items() if isinstance(entry, dict)}
        return {path: source for where, entry in nested.items() for path, source in leaves(entry, where).items()}

    sources = leaves(hardware_to_dict(hardware))
    assert len(sources) >= 24 and all(sources.values())
    assert set(sources) == set(hardware.sources)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_what_is_saved_loads_again(name, suffix, tmp_path: Path):
    hardware = load_hardware(name)
    save_hardware(hardware, tmp_path / f"p{suffix}")
    assert load_hardware(str(tmp_path / f"p{suffix}")) == hardware


def test_bytes_of_a_weight_are_the_dtype_s_where_the_profile_has_none(tmp_path):
    hardware = load_hardware("cpu")
    matrices = (Matrix(3, 5, "bfloat16"), Matrix(2, 2, "float32"))
    assert not hardware.weight_bytes and hardware.stored_bytes(matrices) == 3 * 5 * 2 + 2 * 2 * 4
    held = replace(hardware, weight_bytes={"bfloat16": 1.5}, sources={**hardware.sources, "weight_bytes.bfloat16": "x"})
    save_hardware(held, tmp_path / "p.yaml")
    again = load_hardware(str(tmp_path / "p.yaml"))
    assert again == held and again.stored_bytes(matrices) == 3 * 5 * 1.5 + 2 * 2 * 4


def test_the_profile_at_a_pace():
    hardware = load_hardware("cpu")
    found = hardware.at_pace(0.5, 0.8)
    assert found.bandwidth(1, 1) == pytest.approx(0.5 * hardware.bandwidth(1, 1))
    assert found.rate("bfloat16", 1, 1) == pytest.approx(0.8 * hardware.rate("bfloat16", 1, 1))
    assert found.overheads.layer == pytest.approx(hardware.overheads.layer / 0.8)
    assert found.intra_node.bandwidth == pytest.approx(0.5 * hardware.intra_node.bandwidth)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"output: .*p\.txt' is not allowed; it must end in"):
        save_hardware(load_hardware("cpu"), tmp_path / "p.txt")


BROKEN = {
    "no mapping": (lambda c: [], "hardware: 'x': a list is not allowed"),
    "unknown field": (lambda c: c | {"colour": 1}, "colour: no such field"),
    "no name": (lambda c: c | {"name": 3}, "name: 3 is not allowed"),
    "cores": (lambda c: c | {"cores": 0}, "cores: 0 is not allowed; it must be an integer of at least 1"),
    "plain number": (lambda c: c | {"memory_bytes": 5}, r"memory_bytes: 5 is not allowed; it must be \{value"),
    "missing": (lambda c: {k: v for k, v in c.items() if k != "overlap"}, "overlap: None is not allowed"),
    "negative": (
        lambda c: put(c, -1.0, "memory_bytes"),
        "memory_bytes: -1.0 is not allowed; it must be a number above",
    ),
    "infinite": (lambda c: put(c, float("inf"), "memory_bytes"), "memory_bytes: inf is not allowed"),
    "nan": (lambda c: put(c, float("nan"), "overheads", "step"), "overheads.step: nan is not allowed"),
    "text": (lambda c: put(c, "1e9", "intra_node", "bandwidth"), "intra_node.bandwidth: '1e9' is not allowed"),
    "no bandwidth": (lambda c: put(c, 0, "inter_node", "bandwidth"), "inter_node.bandwidth: 0 is not allowed"),
    "truth": (lambda c: put(c, True, "overlap"), "overlap: True is not allowed; it must be one of"),
    "rule": (lambda c: put(c, "city", "rows_out"), "rows_out: 'city' is not allowed"),
    "share": (lambda c: put(c, 1.5, "attention_rate"), "attention_rate: 1.5 is not allowed.* at most 1"),
    "empty table": (lambda c: put(c, {}, "memory_bandwidth"), "memory_bandwidth: an empty table"),
    "table key": (lambda c: put(c, {"x": 1.0}, "memory_bandwidth"), "memory_bandwidth: 'x' is not allowed"),
    "dtype": (lambda c: c | {"matrix_rate": {"int3": c["matrix_rate"]["float32"]}}, "matrix_rate: 'int3' is not"),
    "attention dtype": (lambda c: put(c, "float8", "attention_dtype"), "dtype: 'float8' is not in the hardware"),
    "above all": (lambda c: put(c, {1: 0.5, 2: 1.2}, "efficiency", "float32"), "a share above 1 is not allowed"),
    "sinking": (lambda c: put(c, {1: 0.1, 2: 0.9}, "efficiency", "float32"), "rows / share must not fall"),
    "weights": (lambda c: c | {"weight_bytes": {"bfloat16": 1.5}}, r"weight_bytes.bfloat16: 1.5 is not allowed"),
    "weights of no dtype": (lambda c: c | {"weight_bytes": {"int3": 1.5}}, "weight_bytes: 'int3' is not"),
    "cold": (lambda c: put(c, {0: 1.0, 8: 3.0, 9: 2.0}, "cold_factor"), "cold_factor: a factor is not allowed"),
    "section": (lambda c: c | {"overheads": 1}, "overheads: 1 is not allowed; it must be a mapping"),
    "fields": (lambda c: c | {"intra_node": {"speed": 1}}, r"intra_node: the fields \['speed'\] are not allowed"),
}


def put(found: dict, value: object, *path: str) -> dict:
    found = copy.deepcopy(found)
    entry = found
    for name in path:
        entry = entry[name]
    entry["value"] = value
    return found


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_profile_is_refused_by_name(case):
    change, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        parse_hardware(yaml.safe_dump(change(content())), "x")


def test_no_such_file_and_no_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"hardware: 'h100' is not allowed; it must be a file or one of \['cpu'"):
        load_hardware("h100")
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"hardware: .*cannot be read"):
        load_hardware(str(tmp_path / "p.yaml"))
    with pytest.raises(ValueError, match="hardware: 'x' is not YAML"):
        parse_hardware("{a: [", "x")


@given(st.text(max_size=60) | st.recursive(st.integers() | st.text(max_size=4), st.lists).map(json.dumps))
def test_any_text_is_a_profile_or_a_value_error(text):
    with pytest.raises(ValueError, match="hardware: 'x'"):
        parse_hardware(text, "x")


@given(ranks=st.integers(1, 64), active=st.integers(1, 64))
def test_ranks_of_a_node_never_read_more_than_it_gives(ranks, active):
    hardware = load_hardware("cpu")
    active = min(active, ranks, hardware.ranks_per_node)
    one = hardware.bandwidth(ranks, active)
    at_work = min(active, hardware.cores / max(hardware.cores_per_rank(ranks), 1))
    assert one * at_work <= interpolate(hardware.memory_bandwidth, hardware.cores) * (1 + 1e-9)
    assert one <= hardware.bandwidth(ranks, 1) * (1 + 1e-9)


@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=9))
def test_more_rows_never_take_less(rows):
    for name in NAMES:
        hardware = load_hardware(name)
        for dtype in hardware.efficiency:
            ordered = np.sort(rows)
            seconds = ordered / hardware.efficiency_of(dtype, ordered)
            assert (np.diff(seconds) >= -1e-9 * seconds[1:]).all()
