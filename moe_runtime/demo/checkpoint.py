"""Builds the demo checkpoint in the user's cache folder, once, on first use."""

import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from moe_runtime.demo.carve import CORRECTION_BIAS, Carving, carve_layer, carved_config
from moe_runtime.demo.files import CARVING
from moe_runtime.demo.gguf_model import DenseModel
from moe_runtime.demo.manifest import find_damage, write_manifest
from moe_runtime.demo.source import GGUF_SHA256, WHEEL_VERSION, DemoModelError, locate_gguf
from moe_runtime.demo.tokenizer import write_tokenizer
from moe_runtime.system.cache_folder import default_cache_dir

# Increase it whenever the files written here change: a cached checkpoint of another version is not used.
BUILDER_VERSION = 3
LOCK_DEADLINE_S = 900.0


def ensure_demo_model(cache_dir: Path | None = None) -> Path:
    """Path of the demo checkpoint (an HF glm4_moe directory), built on first use, and anew if its files are damaged.

    cache_dir: default `$MOE_RUNTIME_CACHE`, else `$XDG_CACHE_HOME/moe-runtime`, else `~/.cache/moe-runtime`.
    Safe to call from several processes at once: one builds, the others wait for it. A folder with the final name is
    complete. Raises `DemoModelError` with one line if the weights cannot be found, the lock is not released, or the
    cache folder cannot be written.
    """
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    checkpoint = cache_dir / f"demo-{_fingerprint()}"
    try:
        if not checkpoint.is_dir() or find_damage(checkpoint) is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _exclusive(cache_dir / "demo.lock"):
                _build_if_needed(cache_dir, checkpoint)
    except OSError as error:
        raise DemoModelError(
            f"the demo model cannot be written to the cache folder {cache_dir} ({error}); "
            "set MOE_RUNTIME_CACHE to a folder that can be written"
        ) from error
    return checkpoint


def _build_if_needed(cache_dir: Path, checkpoint: Path) -> None:
    """Build the checkpoint unless it is there and whole. The caller holds the lock."""
    if checkpoint.is_dir():
        damage = find_damage(checkpoint)
        if damage is None:
            return
        print(f"the demo model in {checkpoint} is damaged ({damage}); building it anew", file=sys.stderr)
        shutil.rmtree(checkpoint)
    for leftover in cache_dir.glob(".partial-*"):  # of killed builds: we hold the lock, so none runs
        shutil.rmtree(leftover)
    gguf_path = locate_gguf(cache_dir)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir) as tmp:
        partial = Path(tmp) / "checkpoint"
        partial.mkdir()
        build_checkpoint(gguf_path, Carving.load(), partial)
        write_manifest(partial)
        partial.rename(checkpoint)


def build_checkpoint(gguf_path: Path, carving: Carving, folder: Path) -> None:
    """Write config, weights and tokenizer of the carved model to `folder`.

    Weights are the dequantised values, rounded to bfloat16. The biases that choose experts stay in float32, as in the
    published checkpoints of the family.
    """
    import torch  # here, because the engine's front imports this file without torch
    from safetensors.torch import save_file

    dense = DenseModel(gguf_path)
    tensors = {"model.embed_tokens.weight": dense.embedding(), "model.norm.weight": dense.final_norm()}
    layers = range(dense.sizes.num_layers)
    for layer in tqdm(layers, desc="building the demo model", unit="layer", file=sys.stderr):
        tensors |= carve_layer(dense, carving, layer)
    stored = {
        name: torch.from_numpy(array).to(torch.float32 if name.endswith(CORRECTION_BIAS) else torch.bfloat16)
        for name, array in tensors.items()
    }
    weights = folder / "model.safetensors"
    save_file(stored, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes the file private, but a cache folder may be shared
    _write_json(folder / "config.json", carved_config(dense.sizes, carving))
    _write_json(folder / "generation_config.json", _generation_config(dense))
    write_tokenizer(dense, folder)


def _generation_config(dense: DenseModel) -> dict[str, int | list[int]]:
    end_of_turn = dense.field("tokenizer.ggml.eos_token_id")
    end_of_text = dense.field("tokenizer.ggml.tokens").index("<|endoftext|>")
    return {
        "bos_token_id": dense.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": dense.field("tokenizer.ggml.padding_token_id"),
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _fingerprint() -> str:
    parts = (WHEEL_VERSION, GGUF_SHA256, str(BUILDER_VERSION), hashlib.sha256(CARVING.read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@contextmanager
def _exclusive(lock_path: Path) -> Iterator[None]:
    """Hold an advisory lock on `lock_path`. The kernel releases it whenever the process ends, even if it is killed."""
    deadline = time.monotonic() + LOCK_DEADLINE_S
    with lock_path.open("a") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DemoModelError(
                        f"another process has held {lock_path} for {LOCK_DEADLINE_S:.0f} s; "
                        "end it, or set MOE_RUNTIME_CACHE to another folder"
                    ) from None
            if not waiting:
                print(f"waiting for another process to build the demo model ({lock_path})", file=sys.stderr)
                waiting = True
            time.sleep(0.1)
        yield
