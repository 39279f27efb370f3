"""The engine's options, as the user sets them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

from moe_runtime.config.checks import check_integer, is_number
from moe_runtime.config.limits import OVERFLOWS, Limits
from moe_runtime.config.model import ModelConfig
from moe_runtime.config.quantization import check_quantization, quantized
from moe_runtime.types.expert_policy import ExpertPolicy, parse_expert_policy

DTYPES = ("auto", "float32", "bfloat16")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
GENERATION_CONFIGS = ("auto", "none")
BALANCE = ("off", "auto", "eplb")
DISPATCHERS = ("auto", "local", "all_to_all", "all_gather", "symmetric")


@dataclass(frozen=True)
class EngineConfig:
    """The engine's options. They have the same names as Python arguments, command-line flags and keys of a YAML file.

    Attributes:
        model: a local Hugging Face directory, a GGUF file, a hub id, or "demo".
        tokenizer: directory, GGUF file or hub id of the tokenizer; None uses the model's.
        ep_size: number of ranks that share the experts.
        dtype: data type of weights and activations; "auto" uses the checkpoint's.
        device: where ranks run; "auto" uses CUDA if it is available.
        max_model_len: maximum length of prompt plus output; None derives it from the model's configuration.
        max_num_seqs: maximum sequences that a rank runs in one step.
        max_num_batched_tokens: maximum tokens that a rank runs in one step; longer prompts are prefilled in chunks.
        block_size: tokens per page of the KV cache.
        kv_cache_memory_bytes: KV cache per rank; None takes what the sequences can use, within the free memory.
        quantization: quantise weights while they are loaded: "int8", "int4", "fp8" or "mxfp4"; None keeps them as they
            are in the checkpoint.
        quantization_parts: which matrices that quantises. Dense MLPs and shared experts belong to the experts; gates
            and the embedding are never quantised.
        quantization_group_size: weights of an output that share a scale; None takes 128 for int8 and fp8, 32 for int4
            and mxfp4.
        activation_quantization: "int8" rounds the rows that are multiplied with quantised weights to int8, in blocks of
            up to 128 inputs, which makes native CPU kernels faster; None keeps them. Not with fp8.
        enable_prefix_caching: keep the keys and values of tokens that were computed, as long as no sequence needs their
            pages, and reuse them in requests that begin with the same tokens.
        kv_cache_dtype: "fp8" (E4M3) or "int8" keeps keys and values in 8 bits, with a scale for each row, in about half
            of the memory of bfloat16 and with some loss; "auto" keeps them in the dtype of the activations.
        load_format: "dummy" makes random weights and reads none.
        check_weights: check while loading that all weights are finite. A checkpoint with NaN or infinity is refused,
            and the error names the tensor. This takes one more pass over the weights in memory.
        generation_config: "auto" takes the sampling parameters in the model's generation_config.json where a request
            leaves them out; "none" ignores them. End-of-sequence ids are read from it in any case.
        skip_tokenizer_init: load no tokenizer; prompts and outputs are token ids.
        seed: seeds dummy weights, and the seeds drawn for requests that have none.
        batch_invariant: give every token the same bits in any batch, on any number of ranks, at some cost in speed.
            Native CPU kernels always do.
        enforce_eager: run decode steps on GPUs without CUDA graphs.
        dispatcher: "auto" chooses one for each step by its number of tokens; "symmetric" is for CPU ranks of one host.
        balance: "auto" moves and replicates hot experts while serving, if that pays back. "eplb" does so by DeepSeek's
            published algorithm, as a baseline. "off" does so only when asked.
        balance_interval: steps between two checks of the load by the balancer.
        redundant_experts: slots per rank and layer beyond those for one copy of every expert. Give one number for all
            ranks, or one per rank, as in 2,0,1,0.
        migration_bytes_per_step: bytes of expert weights that a rank copies between two steps; None takes as many as
            lengthen steps by about 15 percent.
        placement: file of the placement to start with; None spreads the experts evenly, in order.
        routing: experts per token for requests that do not set it: "full", "balanced", "fast", or a policy such as
            "top_k=4", "top_p=0.8" or "threshold=0.5"; None is "full".
        routing_calibration: file written by `moe-runtime calibrate`; None uses the one in the model's folder, if any.
        capacity_factor: maximum assignments that an expert takes from a rank's tokens in one dispatch round, as a
            multiple of the mean; None sets no limit.
        overflow: what happens to assignments beyond the capacity. "queue" runs them in further dispatch rounds of the
            layer and changes no token. "reroute" sends them to the next-best expert with room, and "drop" drops them;
            with both, tokens depend on the batch.
        balance_epsilon: let a token use an expert on a less loaded rank instead of one whose score is better by at most
            this share. The load is that of an earlier step, so tokens depend on the batch. None turns this off.
        overload_routing: while many requests wait, the expert policy of new requests that set none: "balanced", "fast",
            or a policy such as "top_k=4". None never lowers them.
        overload_queue: N,M: that begins when more than N requests wait, and ends when less than M do. None takes the
            maximum of sequences that all ranks run, and a quarter of it.
        decode_slowdown: how long a step that continues outputs may take, as a multiple of the same step without
            prompts; prompts then run in smaller chunks. "inf" sets no bound.
        max_queue: requests that may wait; the server refuses more of them with status 429.
        queue_timeout: seconds within which a request must begin to run; None sets no limit.
        record_trace: .npz file for the experts used in all steps, written when the engine ends.
        served_model_name: the model's name in the HTTP interface; None uses `model`.
        step_timeout: seconds after which an unfinished step is an error.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """

    model: str
    tokenizer: str | None = None
    ep_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    quantization: str | None = None
    quantization_parts: str = "experts,attention,head"
    quantization_group_size: int | None = None
    activation_quantization: str | None = None
    kv_cache_dtype: str = "auto"
    load_format: str = "auto"
    check_weights: bool = False
    generation_config: str = "auto"
    skip_tokenizer_init: bool = False
    seed: int = 0
    batch_invariant: bool = False
    enforce_eager: bool = False
    dispatcher: str = "auto"
    balance: str = "off"
    balance_interval: int = 100
    redundant_experts: int | Sequence[int] = 0
    migration_bytes_per_step: int | None = None
    placement: str | None = None
    routing: str | ExpertPolicy | None = None
    routing_calibration: str | None = None
    capacity_factor: float | None = None
    overflow: str = "queue"
    balance_epsilon: float | None = None
    overload_routing: str | ExpertPolicy | None = None
    overload_queue: Sequence[int] | None = None
    decode_slowdown: float = 2.0
    max_queue: int = 1024
    queue_timeout: float | None = None
    record_trace: str | None = None
    served_model_name: str | None = None
    step_timeout: float = 300.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(
                f'model: {self.model!r} is not allowed; it must be a directory, a .gguf file, a hub id or "demo"'
            )
        for name, allowed in (
            ("dtype", DTYPES),
            ("device", DEVICES),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("load_format", LOAD_FORMATS),
            ("generation_config", GENERATION_CONFIGS),
            ("dispatcher", DISPATCHERS),
            ("balance", BALANCE),
            ("overflow", OVERFLOWS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; it must be one of {list(allowed)}")
        check_quantization(self.quantization, self.quantization_parts, self.quantization_group_size)
        if self.activation_quantization not in (None, "int8"):
            raise ValueError(
                f'activation_quantization: {self.activation_quantization!r} is not allowed; it must be "int8" or absent'
            )
        object.__setattr__(self, "routing", parse_expert_policy(self.routing))
        self._check_overload()
        for name in ("tokenizer", "placement", "routing_calibration", "record_trace", "served_model_name"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}: {value!r} is not allowed; it must be a non-empty string")
        for name in (
            "enable_prefix_caching",
            "check_weights",
            "skip_tokenizer_init",
            "batch_invariant",
            "enforce_eager",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; it must be true or false")
        for name in ("ep_size", "max_num_seqs", "max_num_batched_tokens", "balance_interval", "max_queue"):
            check_integer(name, getattr(self, name), 1)
        object.__setattr__(self, "redundant_experts", parse_redundant(self.redundant_experts, self.ep_size))
        for name in ("max_model_len", "kv_cache_memory_bytes", "migration_bytes_per_step"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ValueError(f"block_size: {self.block_size!r} is not allowed; it must be one of [8, 16, 32, 64, 128]")
        if not isinstance(self.step_timeout, (int, float)) or not self.step_timeout > 0:
            raise ValueError(f"step_timeout: {self.step_timeout!r} is not allowed; it must be a number above 0")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is not allowed; "
                f"it must be at least max_num_seqs ({self.max_num_seqs})"
            )
        if self.dispatcher == "local" and self.ep_size > 1:
            raise ValueError('dispatcher: "local" is not allowed with ep_size above 1; use "auto"')
        redundant = self.redundant_experts not in (0, (0,))
        if self.ep_size == 1 and (redundant or self.placement or self.balance != "off"):
            raise ValueError(
                "redundant_experts, placement, balance: are not allowed with ep_size 1, which has nothing to balance"
            )
        Limits(self.capacity_factor, self.overflow, self.balance_epsilon)  # checks them
        if self.capacity_factor is not None:
            object.__setattr__(self, "capacity_factor", float(self.capacity_factor))
        if self.balance_epsilon is not None and self.ep_size == 1:
            raise ValueError(
                f"balance_epsilon: {self.balance_epsilon!r} is not allowed; ep_size 1 has nothing to balance"
            )

    def _check_overload(self) -> None:
        """Check the options of scheduling and admission."""
        try:
            object.__setattr__(self, "overload_routing", parse_expert_policy(self.overload_routing))
        except ValueError as error:
            raise ValueError(f"overload_{error}") from error
        queue = self.overload_queue
        if queue is not None:
            if not isinstance(queue, (list, tuple)) or len(queue) != 2 or not all(map(_is_count, queue)):
                raise ValueError(f"overload_queue: {queue!r} is not allowed; it must be two integers of at least 0")
            if queue[0] < queue[1]:
                raise ValueError(f"overload_queue: {queue!r} is not allowed; the second must not be above the first")
            object.__setattr__(self, "overload_queue", tuple(queue))
        if not is_number(self.decode_slowdown) or not self.decode_slowdown > 1:
            raise ValueError(f"decode_slowdown: {self.decode_slowdown!r} is not allowed; it must be a number above 1")
        if self.queue_timeout is not None and not (is_number(self.queue_timeout) and self.queue_timeout > 0):
            raise ValueError(
                f"queue_timeout: {self.queue_timeout!r} is not allowed; it must be a number of seconds above 0"
            )

    def quantized(self, model: ModelConfig) -> ModelConfig:
        """The configuration of a model whose weights are quantised as these options say.

        Raises:
            ValueError: weights of the checkpoint are quantised already.
        """
        return quantized(model, self.quantization, self.quantization_parts, self.quantization_group_size)

    @property
    def limits(self) -> Limits | None:
        """Limits on experts and ranks; None if nothing is limited."""
        limits = Limits(self.capacity_factor, self.overflow, self.balance_epsilon)
        return limits if limits.any else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Build from keyword arguments or a parsed YAML file. Unknown names are refused."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name}: no such option; known options are {known}")
        return cls(**values)


def parse_redundant(value: object, ep_size: int | None = None) -> int | tuple[int, ...]:
    """Redundant experts: one number for all ranks, or one for each rank. In a text, commas separate the numbers.

    Args:
        ep_size: number of ranks; None allows any.

    Raises:
        ValueError: the value is neither.
    """
    found: Any = value
    if isinstance(value, str) and all(word.strip().isdecimal() for word in value.split(",")):
        numbers = [int(word) for word in value.split(",")]
        found = numbers if len(numbers) > 1 else numbers[0]
    if _is_count(found):
        return found
    is_list = isinstance(found, Sequence) and not isinstance(found, bytes)
    if is_list and len(found) == (ep_size or max(1, len(found))) and all(map(_is_count, found)):
        return tuple(found)
    ranks = "rank" if ep_size is None else f"rank ({ep_size})"
    raise ValueError(
        f"redundant_experts: {value!r} is not allowed; it must be an integer of at least 0, or one per {ranks}"
    )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
