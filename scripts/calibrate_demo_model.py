#!/usr/bin/env python3
"""Makes the demo model's artifact: carves every FFN layer of the dense model, fits the gates, measures the result.

Run once by the maintainer, from the repository root, on a Debian system with a network:

    PYTHONSAFEPATH=1 .venv/bin/python scripts/calibrate_demo_model.py --work-dir /tmp/demo-calibration

The texts go into the work folder (nothing is installed). Writes moe_runtime/demo/calibration.npz, and with the measured
figures docs/demo-model.json and docs/images/demo-model-load.png; prints the tables of docs/demo-model.md.

Shapes: L layers, T tokens, D hidden, N neurons of the dense FFN, S shared neurons, E experts, F neurons of an expert.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, Glm4MoeForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from moe_runtime.demo import fit, quality
from moe_runtime.demo.carve import Carving
from moe_runtime.demo.checkpoint import build_checkpoint
from moe_runtime.demo.dense import load_dense
from moe_runtime.demo.files import CARVING
from moe_runtime.demo.gguf_model import DenseModel
from moe_runtime.demo.source import locate_gguf
from moe_runtime.demo.texts import KINDS, fetch_texts, sampled_chats, token_blocks
from moe_runtime.demo.tokenizer import write_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_EXPERTS = 32
NUM_SHARED = 512
NUM_EXPERTS_PER_TOK = 20
LOG2_SCALE = -5
CALIBRATION_BLOCKS = 16  # of 512 tokens, per kind of text
HELD_OUT_BLOCKS = 8
NUM_CHATS = 112
MEASURED_KS = (32, 24, 20, 16, 12, 8)
SKEW_KS = (16, 8)
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short story about a lighthouse.",
    "Give me three tips for sleeping better.",
    "What is the difference between a list and a tuple in Python?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make and measure the demo model's artifact.")
    parser.add_argument("--work-dir", type=Path, required=True, help="for texts and the model; outside the repository")
    parser.add_argument("--measure-only", action="store_true", help="measure the artifact that is there")
    arguments = parser.parse_args()
    work_dir: Path = arguments.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)

    dense = DenseModel(locate_gguf(work_dir))
    write_tokenizer(dense, work_dir)
    tokenizer = AutoTokenizer.from_pretrained(work_dir)
    model = load_dense(dense)
    root = fetch_texts(work_dir)
    documents = {kind: read(root) for kind, read in KINDS.items()}
    documents["chat"] = sampled_chats(model, tokenizer, NUM_CHATS, saved=work_dir / "chats.json")
    if not arguments.measure_only:
        blocks = [token_blocks(tokenizer, texts, CALIBRATION_BLOCKS) for texts, _ in documents.values()]
        carve(dense, capture_ffn_inputs(model, torch.cat(blocks))).save(CARVING)

    held_out = {kind: token_blocks(tokenizer, texts, HELD_OUT_BLOCKS) for kind, (_, texts) in documents.items()}
    figures = {"dense": {kind: quality.perplexity(model, blocks) for kind, blocks in held_out.items()}}
    carving = Carving.load()
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        build_checkpoint(locate_gguf(work_dir), carving, Path(folder))
        figures |= measure_carved(Path(folder), tokenizer, held_out)
    (REPOSITORY / "docs/demo-model.json").write_text(json.dumps(figures, indent=1) + "\n")
    print_tables(figures)


@torch.inference_mode()
def capture_ffn_inputs(model: LlamaForCausalLM, blocks: Tensor) -> list[Tensor]:
    """Inputs of every layer's FFN for all tokens of `blocks`: one (T, D) tensor per layer."""
    num_tokens, hidden_size = blocks.numel(), model.config.hidden_size
    inputs = [torch.empty(num_tokens, hidden_size) for _ in model.model.layers]
    position = 0

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
            rows = args[0].reshape(-1, hidden_size)
            inputs[layer][position : position + len(rows)] = rows

        return hook

    handles = [layer.mlp.register_forward_pre_hook(keep(index)) for index, layer in enumerate(model.model.layers)]
    for batch in tqdm(blocks.split(4), desc="capturing", unit="batch"):
        model.model(input_ids=batch, use_cache=False)
        position += batch.numel()
    for handle in handles:
        handle.remove()
    return inputs


@torch.inference_mode()
def carve(dense: DenseModel, inputs: list[Tensor]) -> Carving:
    """Shared neurons, experts and gates of all layers from the inputs of their FFNs."""
    generator = torch.Generator().manual_seed(0)
    shared, experts, gate_rows, biases = [], [], [], []
    for layer, x_TD in enumerate(tqdm(inputs, desc="carving", unit="layer")):
        gate_ND, up_ND, down_DN = (torch.from_numpy(weight) for weight in dense.ffn(layer))
        hidden_TN = F.silu(x_TD @ gate_ND.T) * (x_TD @ up_ND.T)
        importance_TN = fit.neuron_importance(hidden_TN, down_DN)
        shared_S = fit.select_shared(importance_TN, NUM_SHARED)
        routed = torch.ones(down_DN.shape[1], dtype=torch.bool)
        routed[shared_S] = False
        routed_N = routed.nonzero().squeeze(1)
        points = fit.spectral_coordinates(importance_TN[:, routed_N])
        clusters = fit.balanced_clusters(points, NUM_EXPERTS, generator)
        experts_EF = routed_N[clusters.argsort(stable=True)].view(NUM_EXPERTS, -1)
        gate_ED, bias_E = fit.fit_gate(x_TD, fit.expert_output_norms(hidden_TN, down_DN, experts_EF))
        shared.append(shared_S)
        experts.append(experts_EF)
        gate_rows.append(gate_ED)
        biases.append(bias_E)
    return Carving(
        shared_LS=torch.stack(shared).numpy().astype(np.uint16),
        experts_LEF=torch.stack(experts).numpy().astype(np.uint16),
        gate_LED=torch.stack(gate_rows).numpy().astype(np.float16),
        bias_LE=torch.stack(biases).numpy().astype(np.float32),
        log2_scale=LOG2_SCALE,
        num_experts_per_tok=NUM_EXPERTS_PER_TOK,
    )


def measure_carved(folder: Path, tokenizer: PreTrainedTokenizerBase, held_out: dict[str, Tensor]) -> dict[str, Any]:
    """Perplexities, loads and sample answers of the checkpoint in `folder`; draws the plot."""
    model = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    default_k = model.config.num_experts_per_tok
    figures: dict[str, Any] = {"default_k": default_k, "log2_scale": LOG2_SCALE, "carved": {}, "load": {}}
    for k in tqdm(MEASURED_KS, desc="measuring", unit="k"):
        quality.set_num_experts_per_tok(model, k)
        measured = {kind: quality.perplexity_and_load(model, blocks) for kind, blocks in held_out.items()}
        counts = {kind: counts_BLE for kind, (_, counts_BLE) in measured.items()}
        figures["carved"][k] = {kind: value for kind, (value, _) in measured.items()}
        figures["load"][k] = quality.skew_figures(counts)
        if k == default_k:
            plot_load(counts, REPOSITORY / "docs/images/demo-model-load.png")
    quality.set_num_experts_per_tok(model, default_k)
    for dtype in (torch.float32, torch.bfloat16):
        model = Glm4MoeForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        answers = {question: greedy_answer(model, tokenizer, question) for question in QUESTIONS}
        figures[f"answers_{dtype}".replace("torch.", "")] = answers
    return figures


@torch.inference_mode()
def greedy_answer(model: Glm4MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=96)
    answer: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def plot_load(counts: dict[str, NDArray[np.int64]], path: Path) -> None:
    """Load of every expert as a multiple of its layer's mean, for three kinds of text side by side."""
    kinds = ("novels", "PostgreSQL docs", "Python docs")
    figure, axes = plt.subplots(1, len(kinds), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, kind in zip(axes, kinds, strict=True):
        load_LE = counts[kind].sum(axis=0)
        image = axis.imshow(load_LE / load_LE.mean(axis=1, keepdims=True), vmin=0, vmax=1.6, cmap="viridis")
        axis.set(title=kind, xlabel="expert")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="load / mean of the layer")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def print_tables(figures: dict[str, Any]) -> None:
    """The figures as the Markdown tables of docs/demo-model.md."""
    kinds = list(figures["dense"])
    active = {k: (NUM_SHARED + k * (1536 - NUM_SHARED) // NUM_EXPERTS) / 1536 for k in MEASURED_KS}
    print(markdown_row("k", "active", *kinds), markdown_row(*["---"] * (2 + len(kinds))), sep="\n")
    print(markdown_row("dense", "1", *(f"{figures['dense'][kind]:.1f}" for kind in kinds)))
    for k in MEASURED_KS:
        print(markdown_row(str(k), f"{active[k]:.2f}", *(f"{figures['carved'][k][kind]:.1f}" for kind in kinds)))
    print()
    print(markdown_row("k", *kinds), markdown_row(*["---"] * (1 + len(kinds))), sep="\n")
    for k in MEASURED_KS:
        print(markdown_row(str(k), *(f"{figures['load'][k]['max_over_mean'][kind]:.2f}" for kind in kinds)))
    for k in SKEW_KS:
        load = figures["load"][k]
        print(f"\nk = {k}\n\n{markdown_row('texts', 'hot overlap', 'total variation')}")
        print(markdown_row(*["---"] * 3))
        for pair in load["hot_overlap"]:
            print(markdown_row(pair, f"{load['hot_overlap'][pair]:.2f}", f"{load['total_variation'][pair]:.3f}"))
        for kind in kinds:
            within = (f"{load[name][kind]:.{digits}f}" for name, digits in WITHIN)
            print(markdown_row(f"{kind}, two halves", *within))


WITHIN = (("hot_overlap_within", 2), ("total_variation_within", 3))


def markdown_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    matplotlib.use("Agg")
    main()
