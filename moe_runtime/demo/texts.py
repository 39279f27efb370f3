"""The calibration's texts: four kinds from Debian packages (downloaded, never installed), and chat.

The chat kind is sampled from the dense model itself.
Every kind has two lists of documents: one for the calibration, and one held out for the measurements.
"""

import html
import json
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

BLOCK = 512
DEBIAN_PACKAGES = ("r-cran-janeaustenr", "postgresql-doc-15", "python3.11-doc", "wordnet-base")
HELD_OUT_NOVEL = "Persuasion"
SHORTEST_DOCUMENT = 2000  # characters; a shorter page is mostly headings

Documents = tuple[list[str], list[str]]

TOPICS = (
    "the water cycle", "bread baking", "black holes", "the French Revolution", "photosynthesis", "chess openings",
    "honey bees", "public libraries", "electric cars", "the Roman Empire", "jazz music", "volcanoes", "time zones",
    "the human heart", "learning to swim", "gardening", "stock markets", "vaccines", "the Moon", "poetry",
    "a good night's sleep", "recycling", "the Silk Road", "binary search", "kindness", "mountain climbing",
    "the printing press", "coral reefs", "coffee", "job interviews", "the Amazon rainforest", "bicycles",
    "prime numbers", "the Great Wall of China", "train travel", "dinosaurs", "painting with watercolours",
    "the metric system", "robots", "the ocean tides",
)  # fmt: skip
QUESTIONS = (
    "What is {}?", "Explain {} to a child.", "Write a short story about {}.", "Give me five facts about {}.",
    "Why does {} matter?", "Write a short email to a friend about {}.", "How would you begin to study {}?",
    "Write a Python function that has something to do with {}.", "What are common mistakes people make about {}?",
    "Write a poem about {}.",
)  # fmt: skip


def fetch_texts(work_dir: Path) -> Path:
    """Download the Debian packages and unpack them to a folder below `work_dir`. Returns that folder."""
    root = work_dir / "root"
    if not root.exists():
        partial = work_dir / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "update"], check=True)
        subprocess.run(["apt-get", "download", *DEBIAN_PACKAGES], cwd=partial, check=True)
        for package in sorted(partial.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(partial / "root")], check=True)
        (partial / "root").rename(root)
    return root


def novels(root: Path) -> Documents:
    """Chapters of Jane Austen's novels, from R's lazy-load file: zlib streams, each a serialised vector of lines."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    calibration: list[str] = []
    held_out: list[str] = []
    while data:
        stream = zlib.decompressobj()
        vector = stream.decompress(data[4:])  # the stream follows its length
        data = stream.unused_data
        lines = list(_r_strings(vector))
        title = next(line for line in lines if line.strip())
        chapters = re.split(r"\n(?=(?:CHAPTER|Chapter)\b)", "\n".join(lines))
        target = held_out if title == HELD_OUT_NOVEL else calibration
        target += [chapter for chapter in chapters if len(chapter) >= SHORTEST_DOCUMENT]
    return calibration, held_out


def _r_strings(vector: bytes) -> Iterator[str]:
    """Strings of an R character vector in XDR form. Each is flags (type 9 in the last byte), a length and the bytes."""
    position = vector.index(b"\x00\x00\x00\x10") + 8
    while position < len(vector):
        flags, length = struct.unpack_from(">Ii", vector, position)
        assert flags & 0xFF == 9
        position += 8
        yield vector[position : position + length].decode("utf-8")
        position += length


def postgresql_docs(root: Path) -> Documents:
    """Pages of the PostgreSQL manual, without tags and navigation."""
    pages = []
    for path in sorted((root / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        body = path.read_text("utf-8").partition('<div class="titlepage">')[2].partition('<div class="navfooter">')[0]
        text = html.unescape(re.sub(r"<[^>]+>", "", body))
        text = re.sub(r"(?m)^[ \t]+|[ \t\xa0]+$", "", text)
        pages.append(re.sub(r"\n\s*\n\s*", "\n\n", text).strip())
    return _split([text for text in pages if len(text) >= SHORTEST_DOCUMENT])


def python_docs(root: Path) -> Documents:
    """Sources of the Python documentation, reStructuredText with code."""
    paths = sorted((root / "usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt"))
    texts = [path.read_text("utf-8").strip() for path in paths]
    return _split([text for text in texts if len(text) >= SHORTEST_DOCUMENT])


def wordnet(root: Path) -> Documents:
    """Words with glosses, one per line, in random order, forty per document."""
    lines = []
    for part in ("noun", "verb", "adj", "adv"):
        for entry in (root / f"usr/share/wordnet/data.{part}").read_text("utf-8").splitlines():
            synset, separator, gloss = entry.partition(" | ")
            if separator and not entry.startswith(" "):  # the licence at the top is indented
                lines.append(f"{synset.split()[4].replace('_', ' ')}: {gloss.strip()}")
    random.Random(0).shuffle(lines)
    return _split(["\n".join(lines[start : start + 40]) for start in range(0, 20_000, 40)])


def _split(documents: list[str]) -> Documents:
    """Split documents into two lists; every fifth document is held out."""
    calibration = [text for index, text in enumerate(documents) if index % 5]
    return calibration, documents[::5]


KINDS: dict[str, Callable[[Path], Documents]] = {
    "novels": novels,
    "PostgreSQL docs": postgresql_docs,
    "Python docs": python_docs,
    "WordNet": wordnet,
}


@torch.inference_mode()
def sampled_chats(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, num_chats: int, saved: Path
) -> Documents:
    """Conversations in which `model` answers at temperature 0.8, kept in `saved`; every third topic is held out."""
    if not saved.exists():
        torch.manual_seed(0)
        questions = [(topic, question) for topic in range(len(TOPICS)) for question in QUESTIONS]
        chosen = random.Random(0).sample(questions, num_chats)
        chats: Documents = ([], [])
        for start in tqdm(range(0, num_chats, 32), desc="sampling chats", unit="batch"):
            batch = chosen[start : start + 32]
            texts = _answers(model, tokenizer, [question.format(TOPICS[topic]) for topic, question in batch])
            for (topic, _), text in zip(batch, texts, strict=True):
                chats[topic % 3 == 2].append(text)
        saved.write_text(json.dumps(chats))
    calibration, held_out = json.loads(saved.read_text())
    return calibration, held_out


def _answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[str]:
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in questions
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(**inputs, do_sample=True, temperature=0.8, top_k=0, max_new_tokens=224)
    texts = []
    for prompt, answer in zip(prompts, tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :]), strict=True):
        words, end, _ = answer.partition("<|im_end|>")  # an answer cut by the length limit has no end token
        texts.append(f"{prompt}{words}{end}\n")
    return texts


def token_blocks(tokenizer: PreTrainedTokenizerBase, documents: list[str], num_blocks: int) -> Tensor:
    """Blocks of token ids (num_blocks, BLOCK) from shuffled documents, at most two blocks' tokens from each."""
    documents = random.Random(0).sample(documents, len(documents))
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text[: 12 * BLOCK])["input_ids"][: 2 * BLOCK]
        if len(ids) >= num_blocks * BLOCK:
            return torch.tensor(ids[: num_blocks * BLOCK]).view(num_blocks, BLOCK)
    raise ValueError(f"documents: {len(ids)} tokens, {num_blocks * BLOCK} needed")
