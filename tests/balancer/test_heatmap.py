import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from balancer_samples import random_load
from matplotlib.image import imread

from moe_runtime.balancer import ExpertLoad, Placement, heatmap_page, heatmap_panel
from moe_runtime.balancer.heatmap import _colours, draw_pair

SVG = "{http://www.w3.org/2000/svg}"


def even_load(seed, num_layers, num_experts, num_ranks, **fields):
    load = random_load(seed, num_layers, num_experts, None, **fields)
    return ExpertLoad(
        load.tokens, load.layer_ids, Placement.even(load.layer_ids, num_experts, num_ranks), load.model, load.top_k
    )


def pixels(load):
    return imread(io.BytesIO(load.render("png")))


def test_before_and_after_in_one_picture():
    before = even_load(3, 4, 8, 2)
    more = random_load(4, 4, 8, None)
    tokens = {phase: counts + more.tokens[phase] for phase, counts in before.tokens.items()}
    after = ExpertLoad(tokens, before.layer_ids, before.placement, before.model, before.top_k)
    both = imread(io.BytesIO(draw_pair(before, after)))
    assert both.shape[1] == 1800 and both.shape[0] == 2 * pixels(before).shape[0]
    with pytest.raises(ValueError, match="another model"):
        draw_pair(even_load(3, 4, 6, 2), after)


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "num_ranks", "least_height"),
    [(30, 16, 2, 1300), (30, 32, 4, 1300), (60, 256, 32, 1900)],
)
def test_pictures_of_the_usual_sizes(num_layers, num_experts, num_ranks, least_height):
    load = even_load(21, num_layers, num_experts, num_ranks, top_k=4, num_tokens=(500, 50))
    content = load.render("png")
    image = imread(io.BytesIO(content))
    assert image.shape[1] == 1800
    assert least_height <= image.shape[0] <= 2400
    assert (image[[0, -1], :, :3] == 1).all(), "the page is white at its edges"
    assert len(content) < 600_000
    drawing = load.render("svg")
    assert len(drawing) < 900_000
    assert ET.fromstring(drawing).tag == f"{SVG}svg"


def odd_loads():
    yield "a phase without tokens", random_load(31, num_tokens=(50, 0))
    yield "no tokens at all", random_load(32, num_tokens=(0, 0))
    yield "no placement", random_load(33, num_ranks=None)
    yield "no placement, many experts", random_load(34, num_experts=64, num_ranks=None)
    yield "replicas and empty slots, layers differ", random_load(35, num_experts=7, num_ranks=3, num_spare=2)
    yield "one layer, one expert, one rank", random_load(36, 1, 1, 1, top_k=1)
    yield "as many ranks as experts", even_load(37, 3, 48, 48)
    yield "hundred layers", even_load(38, 130, 6, 2)
    yield "no name, no k", random_load(39, model="", top_k=2)
    yield "a name for mathematics", random_load(40, model=r"$\frac{a}{ & <b> " + "x" * 90)
    tokens = {"prefill": np.array([[9, 0, 0, 0], [0, 0, 0, 0]]), "decode": np.array([[0, 0, 0, 2**60], [1, 1, 1, 1]])}
    yield "a layer without tokens, a huge count", ExpertLoad(tokens, (0, 1), Placement.even(2, 4, 2))
    slots = np.array([[[0, 1], [2, 3], [-1, -1]]])
    counts = np.array([[1, 2, 3, 4]])
    yield "an empty rank", ExpertLoad({"prefill": counts, "decode": counts}, (0,), Placement(slots, 4, (0,)))


@pytest.mark.parametrize("load", [pytest.param(load, id=name) for name, load in odd_loads()])
def test_odd_loads_are_drawn(load):
    assert pixels(load).shape[1] == 1800
    ET.fromstring(load.render("svg"))
    assert len(load.render("html")) > 5000


def test_the_hottest_expert_is_darkest():
    counts = np.full((6, 8), 10)
    counts[4, 5] = 60
    load = ExpertLoad({"prefill": counts, "decode": counts * 0}, tuple(range(6)), Placement.even(6, 8, 2))
    columns = heatmap_panel.Columns.of(load)
    ratio_LC = columns.ratios(load, "prefill")
    assert np.unravel_index(ratio_LC.argmax(), ratio_LC.shape) == (4, 5)
    assert ratio_LC[4, 5] == 60 * 8 / 130
    assert (ratio_LC[0] == 1).all()
    colours = _colours([ratio_LC])
    light, dark = (sum(colours.map(colours.norm(ratio))[:3]) for ratio in (1.0, ratio_LC[4, 5]))
    assert dark < light


def test_balanced_has_one_colour_in_all_pictures():
    shades = [_colours([np.array([[peak, np.nan]])]) for peak in (0.5, 3.0, 7.0, 99.0)]
    assert [shade.top for shade in shades] == [4, 4, 8, 16]
    assert np.ptp([float(shade.norm(1.0)) for shade in shades]) < 1e-6


def test_columns_are_slots_by_rank_and_share_a_replicated_experts_tokens():
    slots = np.array([[[1, 0, -1], [2, 1, -1]], [[0, 1, -1], [2, -1, -1]]])
    counts = np.array([[2, 6, 4], [3, 3, 0]])
    load = ExpertLoad({"prefill": counts, "decode": counts}, (0, 1), Placement(slots, 3, (0, 1)))
    columns = heatmap_panel.Columns.of(load)
    assert columns.rank_C.tolist() == [0, 0, 1, 1]
    assert columns.slot_C.tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(
        columns.ratios(load, "prefill"), [[3 / 4, 2 / 4, 4 / 4, 3 / 4], [3 / 2, 3 / 2, 0, np.nan]]
    )
    assert columns.is_replica.tolist() == [[True, False, False, True], [False] * 4]
    assert columns.is_same_in_all_layers.tolist() == [False, False, True, False]
    assert columns.left_C[2] - columns.left_C[1] > 1, "a gap between the ranks"


def test_labels_do_not_overlap_and_stay_inside():
    rng = np.random.default_rng()
    inside = heatmap_page.Box(0, 0, 3.0, 2.0)
    taken = []
    for x, y in rng.uniform((0, 0), (2.95, 1.95), size=(8, 2)):
        cell = heatmap_page.Box(x, y, 0.03, 0.04)
        label = heatmap_page.free_box(cell, 0.3, 0.125, inside, taken)
        assert label.within(inside)
        assert not any(label.overlaps(other) for other in taken)
        taken.append(label)


def test_ticks_are_round_numbers_with_room():
    places = np.arange(60) * 0.05
    assert heatmap_page.ticks(range(3, 63), places, 0.05, 0.13, (1, 2, 5, 10)) == list(range(2, 60, 5))
    grouped = [0, 1, 2, 0, 1, 2]
    assert heatmap_page.ticks(grouped, np.arange(6) * 0.1, 0.1, 0.15, (1, 2, 4)) == [0, 2, 5]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("num_spare", [0, 1])
def test_the_page_runs_in_a_browser(tmp_path, num_spare):
    load = random_load(51, num_layers=6, num_experts=12, num_ranks=3, num_spare=num_spare, model="a <b> model")
    act = """
    <script>
    const choose = (name, value) => {
      document.getElementById("controls").elements[name].value = value;
      document.getElementById("controls").dispatchEvent(new Event("change"));
    };
    window.onerror = (message) => { document.title = `error: ${message}`; };
    window.onload = () => {
      choose("phase", "decode"); choose("order", "load"); choose("rank", "1"); choose("order", "expert");
      const map = document.getElementById("cursor");
      const press = (key) => map.dispatchEvent(new KeyboardEvent("keydown", { key }));
      ["ArrowRight", "ArrowRight", "ArrowDown"].forEach(press);
    };
    </script></body>"""
    (tmp_path / "load.html").write_text(load.render("html").decode().replace("</body>", act), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-quic",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    page = subprocess.run(
        [CHROMIUM, *flags, "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'load.html'}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert "<title>a &lt;b&gt; model: expert load</title>" in page
    assert "decode: 40 tokens" in page
    for hot in load.hottest(10, "decode"):
        assert f'aria-label="show expert {hot.expert} of layer {hot.layer}"' in page
    rows = re.findall(r"<td>(\d+)</td><td>([\d.]+)%</td>", page)
    assert [int(tokens) for tokens, _ in rows] == [hot.tokens for hot in load.hottest(10, "decode")]
    assert [float(share) for _, share in rows] == pytest.approx(
        [100 * hot.share for hot in load.hottest(10, "decode")], abs=0.051
    )
    assert f"layer {load.layer_ids[1]} · expert 2, {load.tokens['decode'][1, 2]} tokens · " in page
