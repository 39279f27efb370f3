"""Check several GPUs before serving on them: links, collectives, one layer of experts.

    torchrun --nproc-per-node 8 scripts/check_cluster.py [--out FOLDER]
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 scripts/check_cluster.py

Prints tables and, last, verdicts: what is as expected, what to look at, what is wrong. With `--out`, it also writes
`check_cluster.md` and `check_cluster.json`. Exits with 1 if something is wrong. `--device cpu` does the same over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from cluster.measure import (
    Cluster,
    CollectiveTime,
    LayerShape,
    LayerTime,
    Link,
    RankFacts,
    measure_collectives,
    measure_layer,
    measure_links,
    measure_ranks,
)
from cluster.verdicts import Verdict, judge

CHECKED_TOKENS = 8


def report(
    device: str,
    ranks: Sequence[RankFacts],
    links: Sequence[Link],
    collectives: Sequence[CollectiveTime],
    layers: Sequence[LayerTime],
    verdicts: Sequence[Verdict],
) -> str:
    """The page: ranks, links as a matrix, collectives, the layer, verdicts."""
    versions = ", ".join(f"{name} {value}" for name, value in ranks[0].versions.items())
    lines = [f"# {len(ranks)} ranks on {device}", "", f"{versions}.", ""]
    lines += ["| rank | host | device | direct access to ranks | matrix product, us |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.rank} | {r.host} | {r.device} | {', '.join(map(str, r.peers)) or '-'} | {r.matrix_us:.0f} |"
        for r in ranks
    ]
    if links:
        rates = {(link.source, link.target): f"{link.bytes_per_s / 1e9:.3g}" for link in links}
        numbers = range(len(ranks))
        lines += ["", "GB/s from the rank of the row to that of the column, while all ranks send:", ""]
        lines += [f"| | {' | '.join(map(str, numbers))} |", "|---" * (len(ranks) + 1) + "|"]
        lines += [f"| {s} | {' | '.join(rates.get((s, t), '-') for t in numbers)} |" for s in numbers]
    lines += ["", "| collective | bytes a rank | us | GB/s from each rank |", "|---|---|---|---|"]
    lines += [f"| {t.name} | {t.nbytes} | {t.us:.0f} | {t.bytes_per_s / 1e9:.3g} |" for t in collectives]
    lines += ["", "| layer with | tokens a rank | us | error |", "|---|---|---|---|"]
    lines += [
        f"| {layer.dispatcher} | {layer.tokens} | {layer.us:.0f} | "
        f"{'not checked' if layer.error is None else f'{layer.error:.1e}'} |"
        for layer in layers
    ]
    lines += ["", *(f"{v.level.upper():5} {v.what}: {v.text}" for v in verdicts)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line; returns the exit status, the same on all ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--max-bytes", type=int, default=64 << 20, help="of the largest message of a rank")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=(1, 8, 64, 512, 2048), help="of each rank, in the layer"
    )
    for name, default in (("hidden", 2048), ("intermediate", 768), ("experts-per-rank", 16), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the layer")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a collective is given up")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("this is no rank; start it with torchrun --nproc-per-node N")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is here; --device cpu checks the links of CPU ranks")
    if args.top_k > args.experts_per_rank * int(os.environ["WORLD_SIZE"]):
        parser.error(f"--top-k {args.top_k} is not allowed; there are fewer experts")
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend, timeout = ("nccl" if args.device == "cuda" else "gloo"), timedelta(seconds=args.timeout)
    dist.init_process_group(backend, timeout=timeout, device_id=device if args.device == "cuda" else None)
    try:
        return check(args, Cluster(device))
    finally:
        dist.destroy_process_group()


def check(args: argparse.Namespace, cluster: Cluster) -> int:
    """Measure, judge and, on rank 0, report."""
    shape = LayerShape(args.hidden, args.intermediate, args.experts_per_rank, args.top_k)
    sizes = [size for size in (1 << power for power in range(10, 40, 3)) if size < args.max_bytes] + [args.max_bytes]
    with torch.inference_mode():
        ranks = measure_ranks(cluster)
        links = measure_links(cluster, args.max_bytes)
        collectives = list(measure_collectives(cluster, sizes))
        layers = list(measure_layer(cluster, shape, args.tokens, CHECKED_TOKENS))
    verdicts = judge(args.device, ranks, links, collectives, layers)
    if cluster.rank == 0:
        page = report(args.device, ranks, links, collectives, layers, verdicts)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            parts = {"ranks": ranks, "links": links, "collectives": collectives, "layers": layers, "verdicts": verdicts}
            content = {name: [asdict(entry) for entry in entries] for name, entries in parts.items()}
            (args.out / "check_cluster.json").write_text(json.dumps(content, indent=1) + "\n")
            (args.out / "check_cluster.md").write_text(page)
        print(page, end="")
    return int(any(verdict.level == "wrong" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
