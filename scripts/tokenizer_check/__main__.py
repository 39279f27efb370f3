"""Checks every tokenizer and prints a table. See scripts/check_tokenizers."""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
from pathlib import Path

from moe_runtime.text.tokenizer import Tokenizer
from tokenizer_check.checks import CHECKS, Subject
from tokenizer_check.sources import Source, sources
from tokenizer_check.templates import check_template


def check(source: Source, folder: Path, seed: int) -> tuple[int, str, list[str]]:
    """The tokenizer's number of ids, what its template rendered, and the checks that failed."""
    from transformers import AutoTokenizer

    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        source.lay_out(folder)
    ours = Tokenizer.from_path(folder)
    theirs = AutoTokenizer.from_pretrained(folder, mistral_format=False)
    subject = Subject(ours, theirs, source.reference() if source.reference else None, random.Random(seed))
    failures, rendered = [], "failed"
    for name, run in CHECKS.items():
        try:
            run(subject)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    try:
        rendered = check_template(subject)
    except (AssertionError, ValueError) as error:
        failures.append(f"template: {error}")
    return ours.vocab_size, rendered, failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="check_tokenizers", description="Check the tokenizers that packages ship.")
    parser.add_argument("folder", type=Path, help="of the environment, where archives and model directories are")
    parser.add_argument("--only", default="", help="check tokenizers whose name has this text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # transformers warns of texts longer than a model's context
    chosen = [source for source in sources(args.folder / "npm") if args.only in source.name]
    total = len(CHECKS) + 1
    print(f"checks: {', '.join(CHECKS)}, template\n")
    print("| tokenizer | vocabulary | ids of its own library | template | passed |\n|---|---:|---|---|---:|")
    failed: list[str] = []
    for source in chosen:
        num_ids, rendered, failures = check(source, args.folder / "models" / source.name.replace("/", "_"), args.seed)
        passed = f"{total - len(failures)} of {total}"
        reference = "compared" if source.reference else "-"
        print(f"| {source.name} | {num_ids:,} | {reference} | {rendered} | {passed} |", flush=True)
        failed += [f"{source.name}: {failure}" for failure in failures]
    for line in failed:
        print(line if len(line) < 2000 else line[:2000] + " ...", file=sys.stderr)
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
