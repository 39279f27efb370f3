"""JSON and NPZ files of this package, and the errors for all other files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.system.files import field, parse_json, read_text, require_format
from moe_runtime.system.npz import read_npz


def test_text_is_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "text"
    for mark in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(mark + "žluť".encode())
        assert read_text(file) == "žluť"
    file.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"^not a text file \(byte 3 is not UTF-8\)$"):
        read_text(file)


def test_what_is_no_json_is_said_with_its_place() -> None:
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
    with pytest.raises(ValueError, match=r"^not valid JSON \(.+ at line 2, column 3\)$"):
        parse_json("{\n  a}")
    with pytest.raises(ValueError, match=r"^JSON that is nested too deeply$"):
        parse_json("[" * 100_000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"^format: 'list' is not allowed; it must be \"plan\"$"),
        ({"format": "other", "format_version": 1}, r"^format: 'other' is not allowed"),
        ({"format": "plan", "format_version": 2}, r"^format_version: 2 is not allowed; it must be 1$"),
        ({"format": "plan"}, r"^format_version: None is not allowed"),
    ],
)
def test_foreign_formats_are_refused(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_format(data, "plan", 1)
    good = {"format": "plan", "format_version": 1}
    assert require_format(good, "plan", 1) is good


def test_fields_have_their_type() -> None:
    data = {"count": 3, "name": None, "flag": True}
    assert field(data, "count", int) == 3
    assert field(data, "name", str, optional=True) is None and field(data, "none", str, optional=True) is None
    for name, found in (("name", "of type NoneType"), ("none", "missing"), ("flag", "of type bool")):
        with pytest.raises(ValueError, match=rf"^{name}: must be of type int; it is {found}$"):
            field(data, name, int)


def test_an_archive_that_is_damaged_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    rows = np.random.default_rng().integers(0, 99, (4, 5))
    np.savez(file, rows=rows, metadata=json.dumps({"step": 3}))
    arrays, metadata = read_npz(file, ["rows"])
    assert list(arrays) == ["rows"] and np.array_equal(arrays["rows"], rows) and metadata == {"step": 3}
    with pytest.raises(ValueError, match=r"^the NPZ archive lacks columns$"):
        read_npz(file, ["rows", "columns"])
    content = file.read_bytes()
    place = content.index(rows.tobytes()) + int(np.random.default_rng().integers(rows.nbytes))
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"^not a readable NPZ archive; rows\.npy is damaged$"):
        read_npz(file, ["rows"])
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"^not a readable NPZ archive$"):
        read_npz(file, ["rows"])
