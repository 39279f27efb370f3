"""Messages between the front and the ranks. Plain data, no torch; msgspec serializes them between processes.

A `StepPlan` holds every choice that shapes a collective, so that ranks cannot diverge. A chunk names positions of a
sequence, not token ids: the rank keeps each sequence's tokens and appends the tokens it samples. So the front can plan
step n+1 while step n runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from moe_runtime.types.outputs import ExpertChanges
from moe_runtime.types.sampling_params import SamplingParams
from moe_runtime.types.vocabulary import Vocabulary

PADDED = "padded"  # the dispatcher of steps that name a bucket
REPLICA_TURNS = 64  # entries per expert in the replica table, by which its tokens go to its replicas in turn


@dataclass(frozen=True)
class NewSequence:
    """A sequence that is new to a rank, or that was preempted and so dropped by the rank.

    `token_ids` holds the prompt and all tokens generated so far; the first `num_prompt_tokens` are the prompt. `pages`
    of each page group have the keys and values of its first tokens already; its first chunk begins after them. A page
    behind a window is named 0, and not read. Its output follows `grammar`, a text of `grammars.compile`, if not empty.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    pages: list[list[int]] = field(default_factory=list)  # empty: none in any group
    grammar: str = ""


@dataclass(frozen=True)
class PageCopy:
    """Copy a page to another one of the same page group, before any row of the step is written."""

    group: int
    source: int
    target: int


@dataclass(frozen=True)
class Chunk:
    """Positions `start .. start + num_tokens` of a sequence, which this step runs through the model.

    `new_pages` are appended to the sequence's pages before the step, those of each page group to the group's. Pages
    behind a window are never named: the rank reads them no more, and another sequence may hold them. If `sample` is
    set, the sequence's next token is sampled from the last position's logits.
    """

    seq_id: int
    start: int
    num_tokens: int
    new_pages: list[list[int]]
    sample: bool


@dataclass(frozen=True)
class ReplicaChoice:
    """From this step on, this rank's tokens of an expert go to these global slots (`rank * slots + slot`) in turn.

    `layer` counts sparse layers. An expert with one replica has one slot here; see `layers.moe.MoELayer.use_replicas`.
    """

    layer: int
    expert: int
    slots: list[int]


@dataclass(frozen=True)
class RankPlan:
    """One rank's share of a step. The first `num_decode` chunks are decode rows of one token each. All sources of
    `page_copies` are read before any target is written. `vocabulary` comes with the first grammars of all ranks."""

    new_sequences: list[NewSequence] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    num_decode: int = 0
    replica_choices: list[ReplicaChoice] = field(default_factory=list)
    page_copies: list[PageCopy] = field(default_factory=list)
    vocabulary: Vocabulary | None = None

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True)
class StepShape:
    """The part of a step that is the same on all ranks: every choice that shapes a collective.

    Attributes:
        step: number of the step, from 1.
        dispatcher: name of the dispatcher; `PADDED` with a bucket.
        tokens_per_rank: [W].
        measure: ask ranks to report the step's `expert_work`.
        rank_rows: [W][L], the rows that each rank's experts computed in the last step whose results the front knows.
            Set only with `balance_epsilon`.
        bucket: the number of rows, padding included, that every rank runs in a step of only decode rows; 0 for other
            steps. See `worker.decode_graphs`.
    """

    step: int
    dispatcher: str
    tokens_per_rank: list[int]
    measure: bool = False
    rank_rows: list[list[int]] = field(default_factory=list)
    bucket: int = 0


@dataclass(frozen=True)
class RankStep(StepShape):
    """A step as one rank receives it. A rank without tokens has an empty `work` and still takes part.

    The rank first drops the sequences in `work.dropped`, then adds `new_sequences`, applies `replica_choices` and
    `page_copies`, then runs `chunks`.
    """

    work: RankPlan = field(default_factory=RankPlan)


@dataclass(frozen=True)
class StepPlan(StepShape):
    """A step on all ranks, as the front plans it. `ranks` [W] holds each rank's work."""

    ranks: list[RankPlan] = field(default_factory=list)

    def of_rank(self, rank: int) -> RankStep:
        """The step for one rank."""
        shape = {each.name: getattr(self, each.name) for each in fields(StepShape)}
        return RankStep(**shape, work=self.ranks[rank])


@dataclass(frozen=True)
class SlotTask:
    """To a rank, between steps: work on a slot that receives no tokens.

    Copy a logical expert into the slot, about `max_bytes` per task at most, then compute the slot's checksum. The front
    repeats the task until a report says that it is done. With `expert` -1, nothing is copied.
    """

    task_id: int
    layer: int
    slot: int
    expert: int
    max_bytes: int


@dataclass(frozen=True)
class SlotReport:
    """From a rank: the progress of a task. With an `error`, the task has ended and the slot's content is invalid."""

    rank: int
    task_id: int
    done: bool
    copied_bytes: int
    seconds: float
    checksum: int = 0
    error: str = ""


@dataclass(frozen=True)
class ExpertWork:
    """The work of a rank's experts in one sparse layer of one step."""

    touched_slots: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen (or the prompt's) token first, then the best tokens in order.

    `ranks[i]` is the rank of `token_ids[i]` among all tokens; 1 is the best.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True)
class Sample:
    """The token that a rank sampled for a sequence; -1 if the model's logits are not finite.

    `error` says why the sequence's grammar cannot be followed any longer; its token means nothing then.
    """

    seq_id: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str = ""


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens `start + 1 .. start + len(entries)`, found while prefilling from `start`."""

    seq_id: int
    start: int
    entries: list[TokenLogprobs]


@dataclass(frozen=True)
class RoutedExperts:
    """The experts that each token of a chunk used, in every sparse layer.

    `experts` is uint16 [tokens, layers, experts per token] in C order, best first, 0xFFFF where a policy dropped one.
    """

    seq_id: int
    start: int
    is_decode: bool
    experts: bytes


@dataclass(frozen=True)
class SequenceChanges:
    """Expert changes in a sequence's share of a step."""

    seq_id: int
    changes: ExpertChanges


@dataclass(frozen=True)
class RankResult:
    """What one rank reports for one step.

    `expert_rows` [L] are the rows that its experts computed, if the step has `rank_rows`. `extra_rounds` are the
    dispatch rounds beyond one in each layer; they are the same on all ranks.
    """

    step: int
    rank: int
    samples: list[Sample] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    seconds: float = 0.0
    expert_work: list[ExpertWork] = field(default_factory=list)
    routed_experts: list[RoutedExperts] = field(default_factory=list)
    expert_changes: list[SequenceChanges] = field(default_factory=list)
    expert_rows: list[int] = field(default_factory=list)
    extra_rounds: int = 0
