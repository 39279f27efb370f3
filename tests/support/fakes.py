"""Ranks without a model, and small real tokenizers, for tests of the front.

A fake rank has the rules of a real one and fails if a plan breaks them. It writes tokens to pages and reads its
context back from them, so a page that two sequences use gives wrong tokens, unless what they share is the same.
"""

from __future__ import annotations

import copy
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from moe_runtime.config.attention import AttentionConfig
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig, MoEConfig, RopeConfig, layers_alike
from moe_runtime.engine.engine import Engine
from moe_runtime.text.tokenizer import Tokenizer
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.wire.executor import CountsReport, RankInfo
from moe_runtime.wire.messages import (
    Chunk,
    NewSequence,
    PromptLogprobs,
    RankPlan,
    RankResult,
    Sample,
    SlotReport,
    SlotTask,
    StepPlan,
    TokenLogprobs,
)

VOCAB_SIZE = 50
EOS = 0

NextToken = Callable[[list[int], int], int]  # (all tokens before, seed) -> token, or -1


def random_next_token(token_ids: list[int], seed: int) -> int:
    return zlib.crc32(repr((token_ids, seed)).encode()) % VOCAB_SIZE


def fake_logprobs(token_ids: list[int], token_id: int, num_best: int) -> TokenLogprobs:
    """Log-probabilities after `token_ids`: an arbitrary function of them."""
    values = [-1 - zlib.crc32(repr((token_ids, token)).encode()) / 2**32 for token in range(VOCAB_SIZE)]
    order = sorted(range(VOCAB_SIZE), key=lambda token: -values[token])
    listed = [token_id, *order[:num_best]]
    return TokenLogprobs(listed, [values[token] for token in listed], [order.index(token) + 1 for token in listed])


def generate_alone(
    prompt: list[int], params: SamplingParams, seed: int, max_model_len: int, next_token: NextToken = random_next_token
) -> tuple[list[int], str]:
    """Output tokens and finish_reason of a request that runs alone; no stop strings."""
    token_ids = list(prompt)
    while True:
        token_ids.append(next_token(token_ids, seed))
        num_output = len(token_ids) - len(prompt)
        if (token_ids[-1] == EOS and not params.ignore_eos) or token_ids[-1] in params.stop_token_ids:
            return token_ids[len(prompt) :], "stop"
        if num_output == params.max_tokens or len(token_ids) == max_model_len:
            return token_ids[len(prompt) :], "length"


@dataclass
class FakeSequence:
    token_ids: list[int]
    num_prompt_tokens: int
    num_prefill_tokens: int
    params: SamplingParams
    seed: int
    pages: list[list[int]]
    num_computed: int | None = None  # before the first chunk
    states: list[int] = field(default_factory=list)

    def state(self, position: int) -> int:
        """What keys and values at a position depend on, as a number: all tokens up to there, and the expert policy."""
        while len(self.states) <= position:
            before = self.states[-1] if self.states else repr(self.params.routing)
            self.states.append(hash((before, self.token_ids[len(self.states)])))
        return self.states[position]


class FakeRank:
    def __init__(
        self,
        index: int,
        num_pages: Sequence[int],
        windows: Sequence[int | None],
        config: EngineConfig,
        next_token: NextToken,
    ) -> None:
        self.index = index
        self.windows = windows
        self.num_pages = num_pages
        self.config = config
        self.next_token = next_token
        self.sequences: dict[int, FakeSequence] = {}
        self.pages: dict[tuple[int, int, int], tuple[int, int]] = {}  # (group, page, offset) -> (position, state)

    def run(self, step: int, plan: RankPlan) -> RankResult:
        for seq_id in plan.dropped:
            del self.sequences[seq_id]
        for new in plan.new_sequences:
            self.take_in(new)
        self.check_plan(plan)
        self.copy(plan)
        samples, prompt_logprobs = [], []
        for chunk in plan.chunks:  # as in a layer: all keys are written before any is read
            self.write(chunk, self.sequences[chunk.seq_id])
        for chunk in plan.chunks:
            sequence = self.sequences[chunk.seq_id]
            self.context(chunk.seq_id, chunk.start + 1)
            if sequence.params.prompt_logprobs is not None:
                entries = [
                    fake_logprobs(
                        self.context(chunk.seq_id, end), sequence.token_ids[end], sequence.params.prompt_logprobs
                    )
                    for end in range(chunk.start + 1, min(sequence.num_computed + 1, sequence.num_prompt_tokens))
                ]
                if entries:
                    prompt_logprobs.append(PromptLogprobs(chunk.seq_id, chunk.start, entries))
            if chunk.sample:
                samples.append(self.sample(chunk.seq_id, sequence))
        return RankResult(step, self.index, samples, prompt_logprobs, seconds=0.25)

    def take_in(self, new: NewSequence) -> None:
        assert new.seq_id not in self.sequences, "a sequence is taken in twice"
        assert 0 < new.num_prompt_tokens <= len(new.token_ids)
        self.sequences[new.seq_id] = FakeSequence(  # no copy: tokens appended here must not reach the front
            new.token_ids,
            new.num_prompt_tokens,
            len(new.token_ids),
            new.params,
            new.seed,
            [list(pages) for pages in new.pages] or [[] for _ in self.windows],
        )

    def copy(self, plan: RankPlan) -> None:
        assert len({(each.group, each.target) for each in plan.page_copies}) == len(plan.page_copies)
        cells = [
            [self.pages.get((each.group, each.source, offset)) for offset in range(self.config.block_size)]
            for each in plan.page_copies
        ]
        for page_copy, found in zip(plan.page_copies, cells, strict=True):
            for offset, cell in enumerate(found):
                if cell is not None:
                    self.pages[page_copy.group, page_copy.target, offset] = cell

    def check_plan(self, plan: RankPlan) -> None:
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(self.sequences) <= self.config.max_num_seqs
        assert len({chunk.seq_id for chunk in plan.chunks}) == len(plan.chunks), "a sequence has two chunks in a step"
        assert {new.seq_id for new in plan.new_sequences} <= {chunk.seq_id for chunk in plan.chunks}
        for index, chunk in enumerate(plan.chunks):
            is_decode = chunk.start >= self.sequences[chunk.seq_id].num_prefill_tokens
            assert is_decode == (index < plan.num_decode), "decode rows come first"
            assert chunk.num_tokens == 1 if is_decode else chunk.num_tokens > 0

    def write(self, chunk: Chunk, sequence: FakeSequence) -> None:
        assert sequence.num_computed in (None, chunk.start), "a chunk does not begin where the last one ended"
        end = sequence.num_computed = chunk.start + chunk.num_tokens
        assert end <= len(sequence.token_ids), "a position is planned whose token does not exist"
        assert chunk.sample == (end == len(sequence.token_ids))
        size = self.config.block_size
        for group, (new_pages, window) in enumerate(zip(chunk.new_pages, self.windows, strict=True)):
            if window is None:
                held = {page for other in self.sequences.values() for page in other.pages[group]}
                assert held.isdisjoint(new_pages), "a page that a sequence holds is given away"
            assert len(set(new_pages)) == len(new_pages)
            assert all(0 <= page < self.num_pages[group] for page in new_pages)
            pages = sequence.pages[group]
            pages += new_pages
            assert len(pages) == -(-end // size), "there are pages for exactly the positions so far"
            for position in range(chunk.start, end):
                where = (group, pages[position // size], position % size)
                self.pages[where] = (position, sequence.state(position))

    def context(self, seq_id: int, end: int) -> list[int]:
        """The tokens before `end`; those that a group's window shows must be in its pages."""
        sequence, size = self.sequences[seq_id], self.config.block_size
        for group, window in enumerate(self.windows):
            pages = sequence.pages[group]
            for position in range(0 if window is None else max(0, end - window), end):
                cell = self.pages[group, pages[position // size], position % size]
                assert cell == (position, sequence.state(position)), "a page holds another sequence's tokens"
        return sequence.token_ids[:end]

    def sample(self, seq_id: int, sequence: FakeSequence) -> Sample:
        context = self.context(seq_id, sequence.num_computed)
        token_id = self.next_token(context, sequence.seed)
        room = (self.config.max_model_len or 2**30) - len(context)
        assert room > 0 or (room == 0 and sequence.params.max_tokens == 0)
        sequence.token_ids.append(max(token_id, 0))
        num_best = None if token_id < 0 else sequence.params.logprobs
        return Sample(seq_id, token_id, None if num_best is None else fake_logprobs(context, token_id, num_best))


class MockExecutor:
    """Runs plans on fake ranks; a plan runs when it is collected, exactly as it was submitted."""

    def __init__(
        self,
        config: EngineConfig,
        num_pages: Sequence[int | tuple[int, ...]],
        max_inflight: int = 1,
        next_token: NextToken = random_next_token,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        pages = [(count,) if isinstance(count, int) else count for count in num_pages]
        self.max_inflight = max_inflight
        self.plans: list[StepPlan] = []
        self.closed = 0
        self._inflight: deque[tuple[StepPlan, StepPlan]] = deque()
        self._workers = [FakeRank(index, counts, windows, config, next_token) for index, counts in enumerate(pages)]
        self.ranks = [
            RankInfo(
                index,
                os.getpid(),
                "cpu",
                "float32",
                1,
                counts,
                sum(counts) * 1000,
                "float32",
                10**6,
                0.5,
                {"gate": "torch"},
                False,
                ("local",) if len(num_pages) == 1 else ("all_to_all", "all_gather"),
            )
            for index, counts in enumerate(pages)
        ]

    @property
    def num_sequences(self) -> int:
        return sum(len(worker.sequences) for worker in self._workers)

    def submit(self, plan: StepPlan) -> None:
        assert not self.closed and len(self._inflight) < self.max_inflight
        assert plan.step == len(self.plans) + 1 and len(plan.ranks) == len(self._workers)
        assert plan.tokens_per_rank == [rank.num_tokens for rank in plan.ranks] and any(plan.tokens_per_rank)
        self.plans.append(plan)
        self._inflight.append((plan, copy.deepcopy(plan)))

    def collect(self) -> list[RankResult]:
        plan, as_submitted = self._inflight.popleft()
        assert plan == as_submitted, "the front has changed a plan after it was submitted"
        return [worker.run(plan.step, share) for worker, share in zip(self._workers, plan.ranks, strict=True)]

    def expert_counts(self) -> np.ndarray:
        assert not self._inflight
        counts_W2LE = np.zeros((len(self.ranks), 2, 2, 4), np.int64)
        for plan in self.plans:
            for counts_2LE, share, num_tokens in zip(counts_W2LE, plan.ranks, plan.tokens_per_rank, strict=True):
                counts_2LE[0, :, 1] += num_tokens - share.num_decode
                counts_2LE[1, :, 2] += share.num_decode
        return counts_W2LE

    def forget(self) -> None:
        assert not self._inflight
        self.plans.clear()
        for worker in self._workers:
            worker.sequences.clear()

    def request_counts(self) -> None:
        raise AssertionError("nobody watches the load here")

    def send_task(self, rank: int, task: SlotTask) -> None:
        raise AssertionError("nothing moves here")

    def reports(self) -> list[CountsReport | SlotReport]:
        return []

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


def model_config(
    vocab_size: int = VOCAB_SIZE, max_position_embeddings: int = 64, windows: Sequence[int | None] = (None,)
) -> ModelConfig:
    return ModelConfig(
        family="mixtral",
        vocab_size=vocab_size,
        hidden_size=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=max_position_embeddings,
        rope=RopeConfig(theta=1e4, rotary_dim=4),
        moe=MoEConfig(num_experts=4, top_k=1, intermediate_size=8),
        layers=layers_alike(3, AttentionConfig(2, 1, 4), (1, 2), 8, [windows[i % len(windows)] for i in range(3)]),
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_ids=(EOS,),
    )


def make_engine(
    num_pages: Sequence[int | tuple[int, ...]] | None = None,
    max_inflight: int = 1,
    next_token: NextToken = random_next_token,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = VOCAB_SIZE,
    windows: Sequence[int | None] = (None,),
    **options,
) -> tuple[Engine, MockExecutor]:
    num_pages = num_pages or [64]
    options = {"max_model_len": 64, "block_size": 8, "ep_size": len(num_pages), **options}
    config = EngineConfig("fake", **options)
    executor = MockExecutor(config, num_pages, max_inflight, next_token, windows)
    return Engine(config, model_config(vocab_size, windows=windows), executor, tokenizer), executor


TEXTS = [
    "The sea is calm tonight. The tide is full, the moon lies fair upon the straits.",
    "naïve café, 你好世界, 🙂🚀, здравствуй мир",
    "stop and stopping, the end of the story",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]


def save_byte_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """Byte-level BPE as in Llama 3, Qwen, SmolLM: a character may be split over several tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    return _save(raw, path, chat_template)


def save_metaspace_tokenizer(path: Path) -> Tokenizer:
    """As SentencePiece in Mixtral: a word includes its space, a text's first space is dropped, bytes are a fallback."""
    words = sorted({word for text in TEXTS for word in text.split() if word.isascii()})
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,."]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for word in ["▁" + word for word in words]:
        for end in range(2, len(word) + 1):
            for piece in (word[end - 1], word[:end]):
                vocab.setdefault(piece, len(vocab))
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    raw = RawTokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(SPECIAL)
    return _save(raw, path, None)


def save_unigram_tokenizer(path: Path) -> Tokenizer:
    """As SentencePiece in Gemma: spaces are kept as they are, runs of them are added tokens, bytes are a fallback."""
    trained = RawTokenizer(models.Unigram())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    scores = {piece: score for piece, score in json.loads(trained.to_str())["model"]["vocab"] if piece != "<unk>"}
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256)), *scores.items()]
    raw = RawTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    raw.normalizer = trained.normalizer
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(SPECIAL)
    raw.add_tokens([AddedToken("▁" * count, normalized=True) for count in (2, 3, 4)])
    return _save(raw, path, None)


def _save(raw: RawTokenizer, path: Path, chat_template: str | None) -> Tokenizer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:], chat_template=chat_template
    )
    tokenizer.save_pretrained(path)
    return Tokenizer.from_path(path)
