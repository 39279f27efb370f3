"""GGUF files are read as the `gguf` package reads them; what is damaged, foreign or hostile is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFEndian, GGUFValueType
from gguf_models import write
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.weights.gguf_file import TYPES, Gguf, GgufFile

VALUES = {
    "a.uint8": (200, GGUFValueType.UINT8),
    "a.int8": (-100, GGUFValueType.INT8),
    "a.uint16": (60_000, GGUFValueType.UINT16),
    "a.int16": (-30_000, GGUFValueType.INT16),
    "a.uint32": (4_000_000_000, GGUFValueType.UINT32),
    "a.int32": (-2_000_000_000, GGUFValueType.INT32),
    "a.float32": (1e-6, GGUFValueType.FLOAT32),
    "a.bool": (True, GGUFValueType.BOOL),
    "a.text": ("naïve 你好\n", GGUFValueType.STRING),
    "a.uint64": (2**63, GGUFValueType.UINT64),
    "a.int64": (-(2**60), GGUFValueType.INT64),
    "a.float64": (0.1, GGUFValueType.FLOAT64),
    "a.texts": (["a", "", "▁c"], GGUFValueType.ARRAY),
    "a.numbers": ([3, 1, -2], GGUFValueType.ARRAY),
}


def sample(path: Path, **options: object) -> Path:
    writer = gguf.GGUFWriter(path, "sample", **options)
    for key, (value, kind) in VALUES.items():
        writer.add_array(key, value) if kind is GGUFValueType.ARRAY else writer.add_key_value(key, value, kind)
    rng = np.random.default_rng(1)
    writer.add_tensor("plain", rng.normal(size=(2, 3, 5)).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(7,)).astype(np.float16))
    raw = rng.integers(0, 256, (4, 3 * 34), dtype=np.uint8)
    writer.add_tensor("coded", raw, raw_dtype=Kind.Q8_0)
    write(writer)
    return path


def test_equals_the_reference(tmp_path: Path) -> None:
    path = sample(tmp_path / "m.gguf")
    found, reference = GgufFile(path), gguf.GGUFReader(path)
    assert {key: found.metadata[key] for key in VALUES} == {key: value for key, (value, _) in VALUES.items()}
    assert list(found.metadata) == [key for key in reference.fields if not key.startswith("GGUF.")]
    assert len(found.tensors) == len(reference.tensors) == 3
    for tensor in reference.tensors:
        place = found.tensors[tensor.name]
        assert place.dtype == tensor.tensor_type.name and list(place.shape) == tensor.shape.tolist()[::-1]
        assert (place.start, place.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert found.stored.read(place.nbytes, place.start) == tensor.data.tobytes()


def test_types_are_those_of_the_reference() -> None:
    sizes = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {number: kind for number, kind in TYPES.items() if number in sizes} == sizes


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = sample(tmp_path / "m.gguf")
    content, tensors = whole.read_bytes(), GgufFile(whole).tensors.values()
    end = max(tensor.start + tensor.nbytes for tensor in tensors)
    path = tmp_path / "t.gguf"
    for size in [*range(0, end, 7), end - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"^model: .*t\.gguf (is damaged or truncated: .*|is no GGUF file)$"):
            GgufFile(path)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_bytes_that_changed_give_a_file_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = sample(tmp_path_factory.mktemp("m") / "m.gguf")
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(content)
    try:
        found = GgufFile(path)
    except ValueError as error:
        assert str(error).startswith("model: ") and "\n" not in str(error)
    else:
        assert all(place.start + place.nbytes <= len(content) for place in found.tensors.values())


def header(
    *tensors: bytes, version: int = 3, num_tensors: int | None = None, values: bytes = b"", count: int = 0
) -> bytes:
    counts = struct.pack("<QQ", len(tensors) if num_tensors is None else num_tensors, count)
    return b"GGUF" + struct.pack("<I", version) + counts + values + b"".join(tensors)


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    name_bytes = name.encode()
    return (
        struct.pack("<Q", len(name_bytes))
        + name_bytes
        + struct.pack("<I", len(shape))
        + dims
        + struct.pack("<IQ", kind, offset)
    )


def text(key: str, kind: int, rest: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + rest


HOSTILE = {
    "empty": (b"", "is no GGUF file"),
    "foreign": (b"PK\x03\x04" + bytes(60), "is no GGUF file"),
    "version 1": (header(version=1), "has GGUF version 1; it must be little-endian and of version 2 or 3"),
    "many tensors": (header(num_tensors=2**62), "a tensor has 0 dimensions"),
    "many values": (header(count=2**62), "it has '' twice"),
    "long name": (header(struct.pack("<Q", 2**63)), "its header does not end"),
    "long array": (header(values=text("a", 9, struct.pack("<IQ", 10, 2**61)), count=1), "its header does not end"),
    "many texts": (header(values=text("a", 9, struct.pack("<IQ", 8, 2**61)), count=1), "its header does not end"),
    "nested array": (
        header(values=text("a", 9, struct.pack("<IQ", 9, 1)), count=1),
        "a value has type 9, which is not",
    ),
    "unknown value": (header(values=text("a", 99, b""), count=1), "a value has type 99"),
    "value twice": (header(values=text("a", 0, b"\1") * 2, count=2), "it has 'a' twice"),
    "tensor twice": (header(info("a", (8,)), info("a", (8,), offset=32)), "it has 'a' twice"),
    "no dimensions": (header(info("a", ())), "a tensor has 0 dimensions"),
    "many dimensions": (header(info("a", (1,) * 5)), "a tensor has 5 dimensions"),
    "size 0": (header(info("a", (8, 0))), r"a tensor of type F32 has shape \[0, 8\]"),
    "part of a block": (header(info("a", (33,), kind=8)), r"a tensor of type Q8_0 has shape \[33\]"),
    "unknown type": (header(info("a", (8,), kind=77)), "a tensor has type 77, which is not known"),
    "overlap": (header(info("a", (16,)), info("b", (16,), offset=32)), "tensor 'b' is not aligned or overlaps another"),
    "not aligned": (header(info("a", (8,), offset=8)), "tensor 'a' is not aligned"),
    "beyond the end": (header(info("a", (2**40,))), "tensor 'a' ends at byte"),
    "far away": (header(info("a", (8,), offset=2**60)), "tensor 'a' ends at byte"),
    "alignment": (
        header(info("a", (8,)), values=text("general.alignment", 4, struct.pack("<I", 24)), count=1),
        "its general.alignment is 24",
    ),
    "no alignment": (
        header(info("a", (8,)), values=text("general.alignment", 8, struct.pack("<Q", 0)), count=1),
        "its general.alignment is ''",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content + bytes(100 if content else 0))
    with pytest.raises(ValueError, match=rf"^model: .*m\.gguf .*{message}"):
        GgufFile(path)


def test_big_endian_and_absent_files(tmp_path: Path) -> None:
    path = sample(tmp_path / "m.gguf", endianess=GGUFEndian.BIG)
    with pytest.raises(ValueError, match="has big-endian numbers; it must be little-endian"):
        GgufFile(path)
    with pytest.raises(ValueError, match=r"^model: .*none\.gguf cannot be opened: No such file"):
        GgufFile(tmp_path / "none.gguf")


def test_a_split_model_is_found_by_any_part(tmp_path: Path) -> None:
    whole = Gguf(sample(tmp_path / "m.gguf"))
    sample(tmp_path / "s.gguf", split_max_tensors=1)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert [part.name for part in parts] == [f"s-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        found = Gguf(part)
        assert found.metadata["a.texts"] == whole.metadata["a.texts"]
        assert set(found.tensors) == set(whole.tensors)
        for name, (file, place) in found.tensors.items():
            whole_file, whole_place = whole.tensors[name]
            content = file.stored.read(place.nbytes, place.start)
            assert content == whole_file.stored.read(whole_place.nbytes, whole_place.start)
    with pytest.raises(ValueError, match="has no tensor 'other'"):
        whole.shape("other")
    parts[1].rename(tmp_path / "kept")
    with pytest.raises(
        ValueError, match=r"s-00002-of-00003\.gguf is missing; s-00001-of-00003\.gguf is one of 3 parts"
    ):
        Gguf(parts[0])
    (tmp_path / "m.gguf").rename(parts[1])
    with pytest.raises(ValueError, match=r"is part 1 of 1 by its metadata; by its name, it must be 2 of 3"):
        Gguf(parts[0])


def test_names_that_are_nearly_those_of_parts(tmp_path: Path) -> None:
    for name in ("m-00001-of-00000.gguf", "m-00003-of-00002.gguf", "m-1-of-2.gguf"):
        assert len(Gguf(sample(tmp_path / name)).tensors) == 3


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    sample(tmp_path / "s.gguf", split_max_tensors=2)
    first, second = sorted(tmp_path.glob("s-*.gguf"))
    content = second.read_bytes()
    second.write_bytes(content.replace(b"coded", b"plain"))
    with pytest.raises(ValueError, match=rf"^model: {second} has tensor 'plain', which {first} has$"):
        Gguf(first)
