import json

import pytest
from serve_clients import ServerThread
from serve_fakes import FakeEngine

from moe_runtime.balancer.load import ExpertLoad
from moe_runtime.cli import main as cli
from moe_runtime.config.server import ServerConfig


def test_heatmap_of_a_server(tmp_path):
    outputs = [tmp_path / f"load.{suffix}" for suffix in ("png", "svg", "html", "csv", "json", "npz")]
    with ServerThread(FakeEngine) as server:
        words = [word for path in outputs for word in ("-o", str(path))]
        assert cli.main(["heatmap", "--url", server.url + "/", *words]) == 0
    assert outputs[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in outputs[1].read_text() and "<html" in outputs[2].read_text()
    for path in outputs[3:]:
        assert ExpertLoad.load(path) == FakeEngine().expert_load()


def test_heatmap_of_a_server_that_needs_a_key(tmp_path, capsys):
    keys, output = tmp_path / "keys", tmp_path / "load.json"
    keys.write_text("# ours\nsecret\nother\n")
    with ServerThread(FakeEngine, ServerConfig(api_key_file=str(keys))) as server:
        words = ["heatmap", "--url", server.url, "-o", str(output)]
        assert cli.main(words) == 2 and "401" in capsys.readouterr().err
        assert cli.main([*words, "--api-key-file", str(keys)]) == 0
    assert ExpertLoad.load(output) == FakeEngine().expert_load()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_heatmap_of_a_file_and_a_phase(tmp_path, phase):
    saved, picture, table = tmp_path / "load.npz", tmp_path / "load.png", tmp_path / "load.json"
    load = FakeEngine().expert_load()
    load.save(saved)
    words = ["--load", str(saved), "-o", str(picture), "-o", str(table), "--phase", phase]
    assert cli.main(["heatmap", *words]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(table.read_text())["phases"]
    other = {"prefill": "decode", "decode": "prefill"}[phase]
    assert content[phase] == load.counts(phase).tolist()
    assert content[other] == (load.counts(other) * 0).tolist()
