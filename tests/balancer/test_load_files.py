import csv
import io
import json
import re

import numpy as np
import pytest
from balancer_samples import NO_DEADLINE, random_load
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.balancer import ExpertLoad, Placement

LOADED = ["json", "npz", "csv"]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def loads(draw):
    num_experts = draw(st.integers(1, 6))
    return random_load(
        seed=draw(st.integers(0, 2**32)),
        num_layers=draw(st.integers(1, 3)),
        num_experts=num_experts,
        num_ranks=draw(st.sampled_from([None, 1, 3])),
        num_spare=draw(st.integers(0, 2)),
        num_tokens=(draw(st.sampled_from([0, 20])), 5),
        top_k=draw(st.sampled_from([1, num_experts])),
        model=draw(NAMES),
    )


def saved(load, folder, format):
    path = folder / f"load.{format}"
    load.save(path)
    return path


@NO_DEADLINE
@given(loads(), st.sampled_from(LOADED))
def test_round_trip_is_exact(tmp_path_factory, load, format):
    path = saved(load, tmp_path_factory.getbasetemp(), format)
    assert ExpertLoad.load(path) == load
    assert path.read_bytes() == load.render(format)


@NO_DEADLINE
@given(st.lists(st.integers(0, 2**63 - 1), min_size=4, max_size=4), st.sampled_from(LOADED))
def test_round_trip_of_any_count(tmp_path_factory, counts, format):
    tokens = {"prefill": np.array(counts, np.int64).reshape(2, 2), "decode": np.zeros((2, 2), np.int64)}
    load = ExpertLoad(tokens, (0, 4))
    path = tmp_path_factory.getbasetemp() / f"counts.{format}"
    path.write_bytes(load.render(format))
    assert ExpertLoad.load(path) == load


@pytest.mark.parametrize(("name", "allowed"), [("load.gif", "png, svg, html, csv, json, npz"), ("load", "png, svg")])
def test_saving_under_another_suffix_is_refused(tmp_path, name, allowed):
    with pytest.raises(ValueError, match=f"{name}: suffix .* is not allowed; it must be one of {allowed}"):
        random_load(seed=1).save(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_rendering_and_loading_other_formats_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format: 'gif' is not allowed; it must be one of png, svg, html"):
        random_load(seed=1).render("gif")
    with pytest.raises(ValueError, match=r"load\.png: suffix 'png' is not allowed; it must be one of json, npz, csv"):
        ExpertLoad.load(tmp_path / "load.png")


def test_suffix_may_be_in_capitals(tmp_path):
    load = random_load(seed=3)
    load.save(tmp_path / "load.JSON")
    assert ExpertLoad.load(str(tmp_path / "load.JSON")) == load


@pytest.mark.parametrize("format", LOADED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_by_name_or_reads_as_a_load(tmp_path_factory, format, data):
    content = bytearray(random_load(seed=7, num_layers=2, num_experts=3, num_spare=1).render(format))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 3))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{format}"
    path.write_bytes(content)
    try:
        assert isinstance(ExpertLoad.load(path), ExpertLoad)
    except ValueError as error:
        assert str(error).startswith(f"{path}: not an expert load file: ")


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("json", b"{}", 'format: None is not allowed; it must be "moe_runtime.expert_load"'),
        ("json", b"[", "not valid JSON"),
        ("json", b'{"format": "moe_runtime.expert_load", "format_version": 9}', "format_version: 9 is not allowed"),
        ("json", b'{"format": "moe_runtime.expert_load", "format_version": 1}', "phases: .* missing"),
        ("csv", b"a,b\r\n1,2\r\n", "format: None is not allowed"),
        (
            "csv",
            b"# format,moe_runtime.expert_load\r\n# format_version,1\r\n",
            "the table's header must be phase,layer",
        ),
        ("npz", b"PK", "not a readable NPZ archive"),
        ("npz", b"", "not a readable NPZ archive"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path, format, content, message):
    path = tmp_path / f"load.{format}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        ExpertLoad.load(path)
    assert str(error.value).startswith(f"{path}: not an expert load file: ")
    assert "\n" not in str(error.value)


def test_a_foreign_npz_is_refused(tmp_path):
    np.savez(tmp_path / "load.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="the NPZ archive lacks metadata, layer_ids, prefill, decode"):
        ExpertLoad.load(tmp_path / "load.npz")


def test_a_missing_file_stays_an_os_error(tmp_path):
    for format in LOADED:
        with pytest.raises(FileNotFoundError):
            ExpertLoad.load(tmp_path / f"none.{format}")


def test_csv_rows_say_it_all(tmp_path):
    load = random_load(seed=11, num_layers=2, num_experts=5, num_ranks=2, num_spare=1, model="a, b # \n c")
    rows = list(csv.reader(io.StringIO(load.render("csv").decode(), newline="")))
    assert ["# model", "a, b # \n c"] in rows
    header = rows.index(["phase", "layer", "expert", "tokens", "ranks", "slots"])
    assert all(row[0].startswith("# ") for row in rows[:header])
    table = rows[header + 1 :]
    assert len(table) == 2 * 2 * 5
    for phase, layer, expert, tokens, ranks, slots in table:
        row = load.layer_ids.index(int(layer))
        assert int(tokens) == load.tokens[phase][row, int(expert)]
        assert tuple(map(int, ranks.split())) == load.placement.ranks_of(row, int(expert))
        for rank, slot in zip(ranks.split(), slots.split(), strict=True):
            assert load.placement.slots[row, int(rank), int(slot)] == int(expert)


def test_csv_survives_a_spreadsheet(tmp_path):
    """Rows sorted otherwise, every row filled up to the same number of cells, other line ends, a byte order mark."""
    load = random_load(seed=12, num_spare=1)
    rows = list(csv.reader(io.StringIO(load.render("csv").decode(), newline="")))
    head = [row + [""] * (6 - len(row)) for row in rows if len(row) < 6] + [row for row in rows if row[0] == "phase"]
    table = sorted((row for row in rows if row[0] in ("prefill", "decode")), key=lambda row: row[3])
    path = tmp_path / "load.csv"
    text = "\n".join(",".join(row) for row in head + table)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert ExpertLoad.load(path) == load


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("decode,1,0,", "decode,1,1,", "decode, layer 1, expert 1 appears twice"),
        ("\r\ndecode,1,1,", "\r\nlater,1,1,", "phase prefill or decode"),
        ("\r\nprefill,1,0,", "\r\nprefill,1,0.5,", "must be integers"),
        ("\r\nprefill,1,0,", "\r\nprefill,1,-1,", "integers of at least 0"),
        ("# num_ranks,2", "# num_ranks,", "must be given together"),
        ("# num_ranks,2", "# num_ranks,1", "slot . of rank 1 is taken or missing"),
        ("# max_slots,1", "# max_slots,x", "max_slots: 'x' is not allowed"),
    ],
)
def test_csv_errors_say_where(tmp_path, old, new, message):
    tokens = {"prefill": np.array([[5, 6]]), "decode": np.array([[7, 8]])}
    load = ExpertLoad(tokens, (1,), Placement.even([1], 2, 2))
    text = load.render("csv").decode()
    assert old in text
    (tmp_path / "load.csv").write_bytes(text.replace(old, new).encode())
    with pytest.raises(ValueError, match=message):
        ExpertLoad.load(tmp_path / "load.csv")


@NO_DEADLINE
@given(loads())
def test_html_holds_the_exact_data(load):
    page = load.render("html").decode()
    held = re.findall(r'<script type="application/json" id="expert-load">(.*?)</script>', page, re.DOTALL)
    assert len(held) == 1
    assert json.loads(held[0]) == load.to_dict()


def test_html_cannot_be_broken_by_a_name_and_asks_for_nothing():
    name = "</script><script>alert(1)</script><!-- \u2028 & __EXPERT_LOAD_JSON__"
    page = random_load(seed=4, model=name).render("html").decode()
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\(", page.replace("// ", ""))


def test_files_stay_small():
    load = random_load(seed=8, num_layers=60, num_experts=256, num_ranks=32, num_spare=1, top_k=8, num_tokens=(900, 90))
    bounds = {"json": 400_000, "html": 450_000, "npz": 120_000, "csv": 1_200_000}
    assert {name: len(load.render(name)) <= bound for name, bound in bounds.items()} == dict.fromkeys(bounds, True)
