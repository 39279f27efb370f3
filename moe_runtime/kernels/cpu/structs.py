"""The C structs that the native kernels take, and the signatures of their functions; see `api.cpp`.

A class has the name of its C struct, some with `Struct` after it. So C's `Attention` is `AttentionStruct`, and the
Python object that owns one is a `blocks.AttentionCall`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p


class QuantFormat(ctypes.Structure):
    _fields_ = (
        ("code", c_int32),
        ("scale", c_int32),
        ("term", c_int32),
        ("int8_rows", c_int32),
        ("group", c_int64),
    )


class QuantSource(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("codes", "scales", "zeros", "factors", "offsets", "offset_factors"))


class Weight(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("escapes", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("format", c_void_p),
    )


class AttentionShape(ctypes.Structure):
    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_size", c_int64),
        ("value_size", c_int64),
        ("shared", c_int64),
        ("window", c_int64),
        ("sinks", c_void_p),
        ("scale", c_float),
    )


class CachedRows(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("page_stride", c_int64),
        ("token_stride", c_int64),
        ("page_scales", c_int64),
        ("token_scales", c_int64),
    )


class KVPages(ctypes.Structure):
    _fields_ = (
        ("keys", CachedRows),
        ("values", CachedRows),
        ("page_size", c_int64),
        ("code", c_int64),
        ("item_size", c_int64),
        ("key_split", c_int64),
    )
    keep: object = None  # what the pointers point to


class StepLayout(ctypes.Structure):
    _fields_ = (
        ("sequences", c_int64),
        ("tokens", c_int64),
        ("max_pages", c_int64),
        ("query_start", c_void_p),
        ("context_len", c_void_p),
        ("page_table", c_void_p),
    )


class HeadOps(ctypes.Structure):
    _fields_ = (
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("eps", c_float),
        ("norm", c_int32),
    )


class StepHeads(ctypes.Structure):
    _fields_ = (
        ("rotated", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rope_row", c_void_p),
        ("cache_position", c_void_p),
        ("query_scale", c_void_p),
    )


class GateConfig(ctypes.Structure):
    _fields_ = (
        ("experts", c_int64),
        ("top_k", c_int64),
        ("groups", c_int64),
        ("topk_groups", c_int64),
        ("sigmoid", c_int32),
        ("normalize", c_int32),
        ("groups_by_best", c_int32),
        ("scale", c_float),
        ("correction_bias", c_void_p),
    )
    keep: object = None  # what the pointer points to


class NextNormStruct(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("eps", c_float), ("multiplier", c_float))


class ReplicasStruct(ctypes.Structure):
    _fields_ = (("slot", c_void_p), ("length", c_int64))


class SparseStruct(ctypes.Structure):
    _fields_ = (
        ("next", NextNormStruct),
        ("gate", c_void_p),
        ("experts", c_void_p),
        ("shared", c_void_p),
        ("exchange", c_void_p),
        ("replicas", ReplicasStruct),
    )


class SpreadStep(ctypes.Structure):
    _fields_ = (
        ("most_tokens", c_int64),
        ("part_tokens", c_int64),
        ("part_rows", c_int64),
        ("timeout_ns", c_int64),
        ("arrived", c_void_p),
        ("computed", c_void_p),
    )
    keep: object = None  # what the pointers point to


class DenseStruct(ctypes.Structure):
    _fields_ = (("next", NextNormStruct), ("mlp", c_void_p))


class AttentionStruct(ctypes.Structure):
    _fields_ = (
        ("next", NextNormStruct),
        ("shape", AttentionShape),
        ("heads", HeadOps),
        ("qkv", Weight),
        ("qkv_bias", c_void_p),
        ("output", Weight),
        ("output_bias", c_void_p),
    )


class LatentSizes(ctypes.Structure):
    _fields_ = (("query_rank", c_int64), ("latent", c_int64), ("nope", c_int64), ("rope", c_int64))


class LatentStruct(ctypes.Structure):
    _fields_ = (
        ("next", NextNormStruct),
        ("shape", AttentionShape),
        ("sizes", LatentSizes),
        ("down", Weight),
        ("down_bias", c_void_p),
        ("query_norm", c_void_p),
        ("latent_norm", c_void_p),
        ("eps", c_float),
        ("up", Weight),
        ("key", Weight),
        ("value", Weight),
        ("output", Weight),
        ("output_bias", c_void_p),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        ("attention", c_void_p),
        ("latent", c_void_p),
        ("sparse", c_void_p),
        ("dense", c_void_p),
        ("pages", c_void_p),
        ("group", c_int64),
    )


class GroupStep(ctypes.Structure):
    _fields_ = (("layout", c_void_p), ("heads", c_void_p))


class LayersCall(ctypes.Structure):
    _fields_ = (
        ("run", c_void_p),
        ("done", c_uint32),
        ("element", c_int64),
        ("layers", c_void_p),
        ("count", c_int64),
        ("policies", c_void_p),
        ("spread", c_void_p),
        ("steps", c_void_p),
        ("num_decode", c_int64),
        ("residual", c_void_p),
        ("x", c_void_p),
        ("late", c_int64),
    )


class SwiGLUStruct(ctypes.Structure):
    _fields_ = (("alpha", c_float), ("limit", c_float), ("offset", c_float))


class ExpertsStruct(ctypes.Structure):
    _fields_ = (
        ("w13", Weight),
        ("w2", Weight),
        ("slots", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("row_gate", c_void_p),
        ("b13", c_void_p),
        ("b2", c_void_p),
        ("swiglu", SwiGLUStruct),
    )


class GateStruct(ctypes.Structure):
    _fields_ = (
        ("config", GateConfig),
        ("weight", Weight),
        ("bias", c_void_p),
        ("weight_is_float32", c_int32),
        ("counts", c_void_p),
        ("phase_stride", c_int64),
    )


class PoliciesStruct(ctypes.Structure):
    _fields_ = (("policy", c_void_p), ("policies", c_void_p), ("chosen", c_void_p))


class ExchangeShape(ctypes.Structure):
    _fields_ = (
        ("ranks", c_int64),
        ("rank", c_int64),
        ("slots", c_int64),
        ("hidden", c_int64),
        ("top_k", c_int64),
        ("capacity", c_int64),
        ("row_bytes", c_int64),
        ("ranks_share_cores", c_int64),
    )


def address(structure: ctypes.Structure | None) -> int | None:
    """The address of a struct; None for None."""
    return None if structure is None else ctypes.addressof(structure)


SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "moe_may_run": (c_int, ()),
    "moe_set_threads": (None, (c_int,)),
    "moe_num_threads": (c_int, ()),
    "moe_packed_bytes": (c_int64, (c_int, c_int64, c_int64)),
    "moe_pack": (None, (c_int, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "moe_unpack": (None, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "moe_quantized_bytes": (c_int64, (c_void_p, c_int64, c_int64)),
    "moe_pack_quantized": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "moe_unpack_quantized": (None, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "moe_list_escapes": (c_int64, (c_void_p, c_int64, c_void_p)),
    "moe_free_escapes": (None, (c_void_p, c_int64)),
    "moe_take_rows": (c_int64, (c_int, c_void_p, c_void_p, c_int64, c_void_p)),
    "moe_linear": (None, (c_int, c_int, c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "moe_rms_norm": (None, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p)),
    "moe_add_rms_norm": (
        None,
        (c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_float, c_void_p, c_void_p),
    ),
    "moe_silu_mul": (None, (c_int, c_void_p, c_int64, c_int64, c_void_p)),
    "moe_paged_attention": (
        None,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
    ),
    "moe_attention_block": (
        None,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "moe_latent_block": (
        None,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "moe_layers_begin": (None, (c_void_p,)),
    "moe_layers_end": (c_int64, (c_void_p,)),
    "moe_topk_gate": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "moe_argmax": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "moe_group_by_slot": (c_int64, (c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "moe_grouped_mlp": (None, (c_int, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
    "moe_combine": (
        None,
        (c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "moe_choose_experts": (None, (c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p)),
    "moe_sparse_block": (
        c_int64,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    ),
    "moe_dense_block": (None, (c_int, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "moe_exchange_segment_bytes": (c_int64, (c_void_p,)),
    "moe_exchange_open": (c_void_p, (c_void_p, c_void_p)),
    "moe_exchange_close": (None, (c_void_p,)),
    "moe_exchange_dispatch": (
        c_int64,
        (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "moe_exchange_bring_back": (c_int64, (c_void_p, c_void_p, c_int64, c_void_p)),
    "moe_exchange_combine": (c_int64, (c_int, c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "moe_read": (c_uint64, (c_void_p, c_int64)),
}
