"""What quantised weights lose: the demo model on held-out texts, beside llama.cpp's Q8_0 and Q4_0 of the same matrices.

Prints the table of docs/quantization.md: KL divergence from the model in float32, the share of positions with the same
most probable token, and perplexity. Activations are float32, so that nothing but the weights is rounded, and where the
table says so the rows that are multiplied with them. llama.cpp rounds these rows to int8 in blocks of 32.

    python scripts/check_quantization.py --work-dir FOLDER   # texts are downloaded there (Debian packages)

llama.cpp is compiled once, into `.peers`; `--without-llamacpp` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set

from bench_model.gguf_file import write_gguf
from peers.environments import ensure_environment
from text_loss.loss import Loss
from text_loss.reader import LlamaCppReader, Reader

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.quantization import METHODS
from moe_runtime.demo.texts import BLOCK, KINDS, fetch_texts, token_blocks
from moe_runtime.types.weight_format import Code, Scale, WeightFormat
from moe_runtime.weights.checkpoint import resolve_model

Texts = dict[str, list[list[int]]]  # of each kind, blocks of token ids
Logits = Callable[[list[int]], Tensor]

GGUF_FORMATS = {
    "bf16": WeightFormat(Code.BFLOAT16),
    "q8_0": WeightFormat(Code.INT8, Scale.FLOAT16, 32),
    "q4_0": WeightFormat(Code.INT4, Scale.FLOAT16, 32),
}


@dataclass(frozen=True)
class Way:
    """A row of the table.

    Attributes:
        method: of `METHODS`; None leaves the weights as they are.
        group: weights that share a scale; None for the method's own.
        rows: None, or "int8" for `activation_quantization`.
    """

    method: str | None
    group: int | None = None
    rows: str | None = None

    @property
    def format(self) -> WeightFormat:
        format = METHODS[self.method] if self.method else WeightFormat(Code.BFLOAT16)
        return replace(format, group=self.group) if self.group else format

    @property
    def cells(self) -> tuple[str, ...]:
        weights = f"`{self.method}`, groups of {self.format.group}" if self.method else "as they are"
        return weights, self.rows or "float32", bytes_per_weight(self.format)

    def reader(self, model: str | Path) -> Reader:
        return Reader(
            EngineConfig(
                str(model),
                dtype="float32",
                device="cpu",
                quantization=self.method,
                quantization_group_size=self.group,
                activation_quantization=self.rows,
                max_model_len=BLOCK,
                max_num_seqs=1,
            )
        )


REFERENCE = Way(None)
WAYS = tuple(
    Way(method, group, rows)
    for method, group in (("int8", None), ("fp8", None), ("int4", None), ("int4", 128), ("mxfp4", None))
    for rows in (None, "int8")
    if rows is None or method != "fp8"  # FP8 has no products with int8
)


def bytes_per_weight(format: WeightFormat) -> str:
    """Of a large matrix, with its scales."""
    inputs = 4096
    return f"{format.nbytes(1, inputs) / inputs:.3f}"


def held_out_texts(work_dir: Path, model: Path, num_blocks: int) -> Texts:
    tokenizer, root = AutoTokenizer.from_pretrained(model), fetch_texts(work_dir)
    return {kind: token_blocks(tokenizer, read(root)[1], num_blocks).tolist() for kind, read in KINDS.items()}


class Table:
    """Measures one way after the other against the reference's log-probabilities, which it keeps."""

    def __init__(self, reference: Logits, texts: Texts) -> None:
        self._kinds = tuple(texts)
        self._texts = [(kind, tokens) for kind, blocks in texts.items() for tokens in blocks]
        self._expected = list(self._logprobs(reference, "reference"))

    def heading(self) -> str:
        names = ("weights", "rows", "bytes per weight", "KL", "same top token", *self._kinds)
        return f"{_row(*names)}\n{'|---' * len(names)}|\n{self._measured(REFERENCE.cells, self._expected)}"

    def row(self, cells: tuple[str, ...], logits: Logits) -> str:
        return self._measured(cells, self._logprobs(logits, ", ".join(cells[:2])))

    def _logprobs(self, logits: Logits, name: str) -> Iterator[Tensor]:
        for _, tokens in tqdm(self._texts, desc=name, unit="text", leave=False):
            yield logits(tokens).log_softmax(-1)

    def _measured(self, cells: tuple[str, ...], found: Iterable[Tensor]) -> str:
        losses: dict[str, list[Loss]] = {kind: [] for kind in self._kinds}
        for (kind, tokens), expected, logprobs in zip(self._texts, self._expected, found, strict=True):
            losses[kind].append(Loss.of(expected, logprobs, tokens))
        kinds = [Loss.mean(each) for each in losses.values()]
        every = Loss.mean(kinds)
        perplexities = (f"{loss.perplexity:.2f}" for loss in kinds)
        return _row(*cells, f"{every.divergence:.4f}", f"{every.agreement:.1%}", *perplexities)


@contextmanager
def llamacpp(model: Path, kind: str) -> Iterator[LlamaCppReader]:
    """llama.cpp with the model's matrices in a format."""
    python = ensure_environment("llama.cpp-avx2")  # sums in the same order on every processor
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        write_gguf(json.loads((model / "config.json").read_text()), model / "model.safetensors", gguf, kind)
        with closing(LlamaCppReader(python, gguf, Path(folder))) as reader:
            yield reader


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for the texts")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of 512 tokens of each of the four kinds of text")
    parser.add_argument("--without-llamacpp", action="store_true")
    options = parser.parse_args()
    model = resolve_model("demo")
    texts = held_out_texts(options.work_dir.resolve(), model, options.blocks)
    table = Table(REFERENCE.reader(model).logits, texts)
    print(table.heading(), flush=True)
    for way in WAYS:
        print(table.row(way.cells, way.reader(model).logits), flush=True)
    for kind, format in {} if options.without_llamacpp else GGUF_FORMATS.items():
        with llamacpp(model, kind) as theirs:
            rows = "int8" if format.is_quantized else "bfloat16"
            print(table.row((f"llama.cpp, {kind.upper()}", rows, bytes_per_weight(format)), theirs.logits), flush=True)


if __name__ == "__main__":
    main()
