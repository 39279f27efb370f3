"""A rank's choices at its start: device, native kernels that all ranks have, kit, weights, dispatchers."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from moe_runtime.all2all.dispatch import Dispatcher, RowOps, make_dispatchers
from moe_runtime.all2all.padded import make_padded
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.kernels.cpu.loader import load_or_none
from moe_runtime.kernels.cpu.native import Kernels
from moe_runtime.layers.kit import Kit
from moe_runtime.layers.native_kit import NativeKit
from moe_runtime.layers.torch_kit import TorchKit
from moe_runtime.memory.budget import tokens_at_once
from moe_runtime.models.registry import open_weights
from moe_runtime.weights.checked import CheckedWeights
from moe_runtime.weights.checkpoint import RandomWeights, WeightSource
from moe_runtime.wire.messages import PADDED

logger = logging.getLogger(__name__)


def choose_device(asked: str, local_rank: int) -> torch.device:
    """The device of the rank with this number on its host.

    Raises:
        ValueError: there is no such device.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError('device: "cuda" is not allowed; this machine has no CUDA device')
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"ep_size: too many ranks for the {torch.cuda.device_count()} CUDA devices of this host")
    return torch.device("cuda", local_rank)


def native_kernels(device: torch.device, group: dist.ProcessGroup | None) -> Kernels | None:
    """The native CPU kernels, if this is a CPU and all ranks have the same kernels; with torch's number of threads."""
    if device.type != "cpu":
        return None
    kernels = load_or_none()
    found = [None if kernels is None else kernels.instruction_set]
    if group is not None:
        found *= group.size()
        dist.all_gather_object(found, found[0], group=group)
    if kernels is None or len(set(found)) > 1:
        if kernels is not None:
            logger.warning("torch runs instead of native CPU kernels, because ranks have different ones: %s", found)
        return None
    kernels.set_threads(torch.get_num_threads())
    return kernels


def make_kit(config: EngineConfig, kernels: Kernels | None, dtype: torch.dtype, device: torch.device) -> Kit:
    """The kit that makes the layers: native if there are native kernels, else torch.

    Raises:
        ValueError: `activation_quantization` is set, and there are no native kernels.
    """
    if kernels is not None:
        return NativeKit(kernels, dtype, int8_rows=config.activation_quantization == "int8")
    if config.activation_quantization is not None:
        raise ValueError(
            f"activation_quantization: {config.activation_quantization!r} is not allowed here; "
            "only native CPU kernels have it"
        )
    return TorchKit(dtype, device, config.batch_invariant)


def open_source(config: EngineConfig, model: ModelConfig, path: Path) -> WeightSource:
    """The source of the weights. Raises ValueError as `open_weights` does."""
    if config.load_format == "dummy":
        return RandomWeights(config.seed)
    source = open_weights(path, model)
    return CheckedWeights(source) if config.check_weights else source


def choose_dispatchers(
    config: EngineConfig,
    model: ModelConfig,
    group: dist.ProcessGroup | None,
    *,
    num_slots: int,
    row_ops: RowOps,
    dtype: torch.dtype,
    can_share_memory: bool,
    has_buckets: bool,
) -> dict[str, Dispatcher]:
    """The dispatchers that a plan may name, the same on all ranks.

    Args:
        num_slots: the most slots that any rank has; global slot numbers are based on it.
        row_ops: the local work.
        dtype: of the rows.
        can_share_memory: whether all ranks are on one host and have native kernels.
        has_buckets: whether plans may name a bucket.

    Raises:
        ValueError: the user set "symmetric", and it is not possible.
    """
    found = make_dispatchers(group, num_slots, row_ops)
    if has_buckets:
        found[PADDED] = make_padded(group, num_slots)
    if group is not None and config.dispatcher in ("auto", "symmetric"):
        shared = _shared_memory(config, model, group, num_slots, dtype, can_share_memory)
        if shared is not None:
            found["symmetric"] = shared
    return found


def _shared_memory(
    config: EngineConfig,
    model: ModelConfig,
    group: dist.ProcessGroup,
    num_slots: int,
    dtype: torch.dtype,
    is_possible: bool,
) -> Dispatcher | None:
    """The dispatcher over shared memory; None on all ranks if it is not possible and the user did not set it."""
    asked = config.dispatcher == "symmetric"
    if not is_possible:
        if asked:
            raise ValueError(
                'dispatcher: "symmetric" is not allowed here; it needs CPU ranks of one host and a C++ compiler'
            )
        return None
    from moe_runtime.all2all.symmetric import SymmetricDispatcher

    try:
        return SymmetricDispatcher(
            group,
            num_slots,
            max_tokens=min(
                config.max_num_batched_tokens, tokens_at_once(model.moe.num_experts, model.moe.top_k, group.size())
            ),
            hidden_size=model.hidden_size,
            top_k=model.moe.top_k,
            dtype=dtype,
            timeout=config.step_timeout,
        )
    except ValueError as error:
        if asked:
            raise
        logger.warning("ranks exchange rows over gloo: %s", error)
        return None
