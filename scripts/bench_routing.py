"""Measures the quality and the speed of the demo model with fewer experts per token.

    python scripts/bench_routing.py --quality   # texts from Debian packages; minutes on two cores
    python scripts/bench_routing.py --speed     # tokens/s at batch 1, 8 and 32; only meaningful on a quiet machine

`--quality` runs `moe-runtime calibrate` on held-out texts of three kinds, and writes the calibration that ships with
the demo (moe_runtime/demo/routing_calibration.json) and benchmarks/routing/quality.png. `--speed` needs that
calibration and writes benchmarks/routing/speed.json. Settings are measured in turn, and the median of the rounds
counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

from moe_runtime import LLM, SamplingParams
from moe_runtime.cli import main as cli
from moe_runtime.demo.files import EXPERT_CALIBRATION
from moe_runtime.demo.texts import fetch_texts, novels, postgresql_docs, wordnet
from moe_runtime.types.expert_policy import CLASSES

OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "routing"
KINDS = {"novels": novels, "postgresql": postgresql_docs, "wordnet": wordnet}
MEAN_K = "16,12,8"
CHARACTERS = 400_000  # of each kind
BATCHES = (1, 8, 32)
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64


def quality(work_dir: Path, max_tokens: int) -> None:
    """Calibrate the demo and show the table."""
    work_dir.mkdir(parents=True, exist_ok=True)
    root = fetch_texts(work_dir)
    words = ["calibrate", "demo", "--mean-k", MEAN_K, "--max-tokens", str(max_tokens)]
    for name, kind in KINDS.items():
        path = work_dir / f"{name}.txt"
        path.write_text("\n\n".join(kind(root)[1])[:CHARACTERS], encoding="utf-8")
        words += ["--text", str(path)]
    OUT.mkdir(parents=True, exist_ok=True)
    if cli.main([*words, "-o", str(EXPERT_CALIBRATION), "-o", str(OUT / "quality.png")]):
        raise SystemExit(1)


def speed(rounds: int) -> None:
    """Generated tokens per second of each class at each batch size."""
    rows = []
    options = {"max_num_seqs": max(BATCHES), "skip_tokenizer_init": True, "enable_prefix_caching": False}
    with LLM("demo", **options) as llm:
        kernels = sorted(set(llm._engine.executor.ranks[0].kernels.values()))
        for batch in BATCHES:
            prompts = [
                {"prompt_token_ids": [1000 + (97 * row + 31 * place) % 40000 for place in range(PROMPT_TOKENS)]}
                for row in range(batch)
            ]
            rates: dict[str, list[float]] = {name: [] for name in CLASSES}
            for _ in range(rounds):
                for name in CLASSES:
                    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, routing=name)
                    start = time.perf_counter()
                    llm.generate(prompts, params, use_tqdm=False)
                    rates[name].append(batch * OUTPUT_TOKENS / (time.perf_counter() - start))
            for name in CLASSES:
                rows.append({"batch": batch, "class": name, "tokens_per_second": statistics.median(rates[name])})
                print(f"batch {batch:3}  {name:10} {rows[-1]['tokens_per_second']:10.1f} tokens/s", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "kernels": kernels, "rounds": rounds}
    content = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, **machine, "rows": rows}
    (OUT / "speed.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", action="store_true", help="perplexity and KL of policies, and the calibration")
    parser.add_argument("--speed", action="store_true", help="tokens/s of the classes")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/routing-texts"), help="texts go here")
    parser.add_argument("--max-tokens", type=int, default=12288, help="of all texts, for --quality")
    parser.add_argument("--rounds", type=int, default=5, help="for --speed")
    arguments = parser.parse_args()
    if not (arguments.quality or arguments.speed):
        parser.error("give --quality or --speed")
    if arguments.quality:
        quality(arguments.work_dir.resolve(), arguments.max_tokens)
    if arguments.speed:
        speed(arguments.rounds)


if __name__ == "__main__":
    main()
