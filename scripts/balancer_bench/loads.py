"""The loads that placements are planned for: synthetic ones, and the demo model's recorded ones.

Shape suffixes: L layers, E experts, N windows of time.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.synthetic import BURST, SYNTHETIC, drifted

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "balancer"
RECORDED = OUT / "recorded.npz"
SEED = 20
NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, NUM_SLOTS = 16, 256, 32, 9
RECORDED_RANKS, RECORDED_SLOTS = 8, 5
RECORDED_TOP_K = (20, 4)  # the demo model's own, and one with more skew
NUM_WINDOWS = 16
DRIFT = 0.4  # log-normal drift of the load between planning and measuring
DRIFT_A_WINDOW = 0.2
BURST_STAYS = 0.7
NUM_TOKENS = 4096  # tokens of each kind of text

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """A load over time, [N, L, E], and the ranks and slots to place it on."""

    name: str
    load_NLE: Floats
    num_ranks: int
    num_slots: int


def synthetic_settings() -> list[Setting]:
    """For `compare`: two windows, DRIFT apart."""
    settings = []
    for number, (name, make) in enumerate(SYNTHETIC.items()):
        rng = np.random.default_rng([SEED, number])
        load_LE = np.stack([make(rng, NUM_EXPERTS) for _ in range(NUM_LAYERS)])
        settings.append(Setting(name, np.stack([load_LE, drifted(rng, load_LE, DRIFT)]), NUM_RANKS, NUM_SLOTS))
    return settings


def synthetic_series() -> list[Setting]:
    """For `follow`: loads that drift; in the bursty load, bursts end and others begin."""
    settings = []
    for number, (name, make) in enumerate(SYNTHETIC.items()):
        rng = np.random.default_rng([SEED, number, 1])
        load_LE = np.stack([make(rng, NUM_EXPERTS) for _ in range(NUM_LAYERS)])
        if name == "bursty":
            windows = list(_bursts(rng))
        else:
            windows = [load_LE]
            for _ in range(NUM_WINDOWS):
                windows.append(drifted(rng, windows[-1], DRIFT_A_WINDOW))
        settings.append(Setting(name, np.stack(windows), NUM_RANKS, NUM_SLOTS))
    return settings


def _bursts(rng: np.random.Generator) -> list[Floats]:
    base_LE = rng.gamma(2, 1, (NUM_LAYERS, NUM_EXPERTS))
    bursts_LE = rng.random(base_LE.shape) < 1 / 40
    windows = []
    for _ in range(NUM_WINDOWS + 1):
        windows.append(base_LE * np.where(bursts_LE, BURST, 1))
        stays_LE = bursts_LE & (rng.random(base_LE.shape) < BURST_STAYS)
        bursts_LE = stays_LE | (rng.random(base_LE.shape) < (1 - BURST_STAYS) / 40)
    return windows


def recorded_settings() -> list[Setting]:
    """The demo model's recorded loads, one kind of text after the other."""
    with np.load(RECORDED) as file:
        return [
            Setting(
                f"demo, {top_k} of 32",
                file[f"top_{top_k}"].astype(np.float64),
                RECORDED_RANKS,
                RECORDED_SLOTS,
            )
            for top_k in RECORDED_TOP_K
        ]


def record() -> None:
    """Run texts of different kinds through the demo model, and save how many tokens each expert got."""
    from transformers import AutoTokenizer

    from moe_runtime import LLM, SamplingParams
    from moe_runtime.demo.checkpoint import ensure_demo_model
    from moe_runtime.demo.texts import QUESTIONS, TOPICS

    texts = {
        "questions": "\n".join(question.format(topic) for topic in TOPICS for question in QUESTIONS),
        "code": inspect.getsource(argparse),
        "page": (ROOT / "moe_runtime" / "balancer" / "heatmap.html").read_text(encoding="utf-8"),
        "licence": (ROOT / "LICENSE").read_text(encoding="utf-8"),
    }
    counts = {}
    for top_k in RECORDED_TOP_K:
        with tempfile.TemporaryDirectory() as directory:
            for file in ensure_demo_model().iterdir():
                (Path(directory) / file.name).symlink_to(file)
            config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
            (Path(directory) / "config.json").unlink()
            (Path(directory) / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": top_k}))
            tokenizer = AutoTokenizer.from_pretrained(directory)
            with LLM(directory, enable_prefix_caching=False) as llm:
                windows = []
                for text in texts.values():
                    before = llm.expert_load().total
                    prompt = {"prompt_token_ids": tokenizer.encode(text)[:NUM_TOKENS]}
                    llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
                    windows.append(llm.expert_load().total - before)
        counts[f"top_{top_k}"] = np.stack(windows)
    np.savez_compressed(RECORDED, **counts, kinds=np.array(list(texts)))
