"""The shipped forms of the Triton kernels: each a kernel with its argument types, constants and launch options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
import triton

from moe_runtime.kernels import kv_rows
from moe_runtime.kernels.swiglu import PLAIN, SwiGLU
from moe_runtime.kernels.torch_ops import Scoring
from moe_runtime.kernels.triton import (
    attention,
    decode_attention,
    dense_gemm,
    gate,
    group,
    grouped_gemm,
    norms,
    quantized_rows,
    rotary,
    tiles,
)
from moe_runtime.kernels.triton.attend import HeadSizes
from moe_runtime.types.weight_format import Code, Scale, WeightFormat

CACHES = {"i8": "int8", "u8": "fp8"}  # types of rows of 8 bits, as kernels load them
GPT_OSS = SwiGLU(alpha=1.702, limit=7.0, offset=1.0)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
BFLOAT16 = "bf16"
FLOAT32 = "fp32"
POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "e8m0": "*u8",
    "e4m3": "*u8",
    "int8": "*i8",
}  # of scales
# The quantised formats of open models.
FORMATS = {
    "fp8": WeightFormat(Code.FP8, Scale.FLOAT32, 128),
    "mxfp4": WeightFormat(Code.FP4, Scale.E8M0, 32),
    "nvfp4": WeightFormat(Code.FP4, Scale.E4M3, 16),
    "int4 zeros": WeightFormat(Code.INT4, Scale.FLOAT16, 128, has_zero=True),
    "int8": WeightFormat(Code.INT8, Scale.BFLOAT16),
    "q4_k": WeightFormat(Code.UINT4, Scale.INT8, 32, has_offset=True),
    "q6_k": WeightFormat(Code.INT8, Scale.INT8, 16),
}
TILES = {BFLOAT16: tiles.TILES_16_BIT, "fp16": tiles.TILES_16_BIT, FLOAT32: tiles.TILES_32_BIT}


@dataclasses.dataclass(frozen=True)
class Form:
    """One specialisation of a kernel: types of its arguments, and its constants and launch options together."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    meta: Mapping[str, int | float | str]
    uses_tensor_cores: bool = False
    needed_shared: int = 0  # by the tile table; a chip with less never gets this form
    chips: tuple[int, ...] = (80, 90, 100)  # chips for which the wrapper chooses this form

    @property
    def constants(self) -> dict[str, int | float | str | None]:
        """Values of the constexpr parameters; a pointer that has no type is `None`."""
        return {name: self.meta.get(name) for name in self.kernel.arg_names if name not in self.types}

    @property
    def options(self) -> dict[str, int | float | str]:
        """Launch options."""
        return {name: value for name, value in self.meta.items() if name not in self.kernel.arg_names}


def types_of(kernel: triton.JITFunction, meta: Mapping[str, int | float | str], **pointers: str) -> dict[str, str]:
    """Argument types: those of the named pointers; every other argument that is no constant is an int32."""
    constant = set(meta) | {name for name in kernel.arg_names if name.isupper() or name.endswith("_ptr")}
    floats = {name: "fp32" for name in ("eps", "scale", "multiplier") if name in kernel.arg_names}
    return dict.fromkeys((n for n in kernel.arg_names if n not in constant), "i32") | floats | pointers


def weight_pointers(dtype: str, format: WeightFormat | None) -> dict[str, str]:
    """Types of the pointers to weights."""
    if format is None or format.scale is None:
        return {"w_ptr": f"*{dtype}"}
    scale, factor = POINTERS[format.scale.value], format.scale.factor and POINTERS[format.scale.factor.value]
    pointers = {
        "w_ptr": "*u8",
        "scales_ptr": scale,
        "zeros_ptr": "*u8" if format.has_zero else None,
        "factor_ptr": factor,
    }
    if format.has_offset:
        pointers |= {"offsets_ptr": scale, "offset_factor_ptr": factor}
    return {name: kind for name, kind in pointers.items() if kind}


def gemm_forms(
    dtype: str, some_tiles: tuple[tiles.Tile, ...], *, gpt_oss: bool = False, weights: str | None = None
) -> Iterator[Form]:
    """Both products of the expert MLP in each tile; with `gpt_oss`, with biases and its activation."""
    format = None if weights is None else FORMATS[weights]
    operands = dict.fromkeys(("x_ptr", "out_ptr", *(["bias_ptr"] if gpt_oss else [])), f"*{dtype}")
    operands |= weight_pointers(dtype, format)
    words = [*(["gpt-oss"] if gpt_oss else []), dtype, *([weights] if weights else [])]
    activation = GPT_OSS if gpt_oss else PLAIN
    for tile in some_tiles:
        kernel = grouped_gemm.grouped_gemm_kernel
        places = {"counts_ptr": "*i64"} if tile.block_m == grouped_gemm.DECODE_ROWS else {"tile_ptr": "*i32"}
        for swiglu in (activation, None):
            meta = grouped_gemm.grouped_gemm_meta(tile, swiglu=swiglu, in_features=4096, num_slots=128, format=format)
            yield Form(
                " ".join(["grouped_gemm", "gate+up" if swiglu else "down", *words, str(tile)]),
                kernel,
                types_of(kernel, meta, **operands, **places, **({"row_ptr": "*i64"} if swiglu else {})),
                meta,
                uses_tensor_cores=dtype != FLOAT32,
                needed_shared=tile.shared_bytes(ITEMSIZE[dtype]),
            )


def dense_gemm_form(dtype: str, weights: str | None = None) -> Form:
    """The batch-invariant product with a bias."""
    kernel = dense_gemm.dense_gemm_kernel
    tile = next(tile for tile in TILES[dtype] if tile.block_m == 64)
    format = None if weights is None else FORMATS[weights]
    meta = grouped_gemm.gemm_meta(tile, 4096, format)
    operands = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{dtype}") | weight_pointers(dtype, format)
    name = " ".join(["dense_gemm", dtype, *([weights] if weights else []), str(tile)])
    types, needed_shared = types_of(kernel, meta, **operands), tile.shared_bytes(ITEMSIZE[dtype])
    return Form(name, kernel, types, meta, dtype != FLOAT32, needed_shared)


def tile_map_form(num_slots: int) -> Form:
    """The map from tiles to slots."""
    kernel, meta = grouped_gemm.tile_map_kernel, grouped_gemm.tile_map_meta(tiles.TILES_16_BIT[-1], num_slots)
    types = types_of(kernel, meta, counts_ptr="*i64", tile_ptr="*i32")
    return Form(f"tile_map {num_slots} slots", kernel, types, meta)


def gate_form(
    num_experts: int, top_k: int, scoring: Scoring, num_groups: int = 1, topk_groups: int = 1, bias: bool = False
) -> Form:
    """A gate, perhaps with a correction bias."""
    kernel = gate.topk_gate_kernel
    meta = gate.topk_gate_meta(
        num_experts, top_k=top_k, scoring=scoring, num_groups=num_groups, topk_groups=topk_groups, normalize=True
    )
    pointers = {"logits_ptr": "*fp32", "weights_ptr": "*fp32", "experts_ptr": "*i64"}
    pointers |= {"bias_ptr": "*fp32"} if bias else {}
    groups = f" {topk_groups} of {num_groups} groups" if num_groups > 1 else ""
    name = f"topk_gate {scoring}{' with bias' if bias else ''} {top_k} of {num_experts}{groups}"
    return Form(name, kernel, types_of(kernel, meta, **pointers), meta)


def group_forms(num_rows: int, num_slots: int) -> Iterator[Form]:
    """Both kernels of the grouping."""
    meta = group.group_meta(num_rows, num_slots)
    pointers = {"slot_ptr": "*i64", "count_ptr": "*i32"}
    outputs = dict.fromkeys(("order_ptr", "place_ptr", "counts_ptr"), "*i64")
    batch = {"BLOCK_B": group.BLOCKS_TOGETHER}
    shape = f"{num_rows} rows {num_slots} slots"
    yield Form(f"count {shape}", group.count_kernel, types_of(group.count_kernel, meta, **pointers), meta)
    types = types_of(group.place_kernel, meta | batch, **pointers, **outputs)
    yield Form(f"place {shape}", group.place_kernel, types, meta | batch)


def combine_forms(dtype: str) -> Iterator[Form]:
    """The weighted sum of rows in the grouped order."""
    kernel, meta = group.combine_kernel, group.combine_meta(4096, 8)
    pointers = {"y_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "weights_ptr": "*fp32", "place_ptr": "*i64"}
    yield Form(f"combine {dtype} 8 rows a token", kernel, types_of(kernel, meta, **pointers), meta)


def row_forms(dtype: str) -> Iterator[Form]:
    """Norms, activation, rotary embedding and cache writes."""
    for size, residual in ((128, False), (2048, True), (7168, True)):
        kernel, meta = norms.rms_norm_kernel, norms.rms_norm_meta(size)
        names = ["x_ptr", "weight_ptr", "out_ptr", *(["residual_ptr", "sum_ptr"] if residual else [])]
        types = types_of(kernel, meta, **dict.fromkeys(names, f"*{dtype}"))
        yield Form(f"{'add_' if residual else ''}rms_norm {dtype} {size}", kernel, types, meta)
    kernel, meta = norms.scale_rows_kernel, norms.scale_rows_meta(2048)
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    yield Form(f"scale_rows {dtype}", kernel, types_of(kernel, meta, **dict.fromkeys(names, f"*{dtype}")), meta)
    kernel, meta = norms.silu_mul_kernel, norms.silu_mul_meta(14336)
    yield Form(f"silu_mul {dtype}", kernel, types_of(kernel, meta, x_ptr=f"*{dtype}", out_ptr=f"*{dtype}"), meta)
    for heads, kv_heads, size, rotary_dim in ((32, 4, 128, 128), (96, 8, 128, 64)):
        kernel, meta = rotary.rotary_kernel, rotary.rotary_meta(heads, kv_heads, size, rotary_dim)
        names = [name for name in kernel.arg_names if name.endswith("_ptr") and name != "slot_ptr"]
        types = types_of(
            kernel, meta, **dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            slot_ptr="*i64",
        )  # fmt: skip
        yield Form(f"rotary_store_kv {dtype} {heads}/{kv_heads} heads {rotary_dim} of {size}", kernel, types, meta)
    kernel, meta = rotary.store_kv_kernel, rotary.store_kv_meta(8, 128)
    names = [name for name in kernel.arg_names if name.endswith("_ptr") and name != "slot_ptr"]
    types = types_of(kernel, meta, **dict.fromkeys(names, f"*{dtype}"), slot_ptr="*i64")
    yield Form(f"store_kv {dtype}", kernel, types, meta)
    for cache, name in CACHES.items():
        kernel = quantized_rows.store_quantized_kernel
        meta = quantized_rows.store_quantized_meta(8, 128, 16, kv_rows.DTYPES[name])
        pointers = {"x_ptr": f"*{dtype}", "cache_ptr": f"*{cache}", "scale_ptr": "*fp32", "position_ptr": "*i64"}
        yield Form(f"store_quantized {dtype} as {name}", kernel, types_of(kernel, meta, **pointers), meta)


def attention_forms(
    dtype: str,
    sizes: HeadSizes,
    window: int | None,
    *,
    heads_per_group: int = 8,
    sinks: bool = False,
    cache: str | None = None,
) -> Iterator[Form]:
    """Decode, merge and prefill. With sinks, decode is that of a single chunk, because else the merge has them. `cache`
    is the type of rows of 8 bits, a key of `CACHES`."""
    operands = {"q_ptr": f"*{dtype}", "table_ptr": "*i64"} | dict.fromkeys(("k_ptr", "v_ptr"), f"*{cache or dtype}")
    operands |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32") if cache else {}
    sink = {"sinks_ptr": "*fp32"} if sinks else {}
    shape = f"{dtype} {attention_shape(sizes, window, heads_per_group, sinks)}"
    shape += f", rows of {CACHES[cache]}" if cache else ""
    uses_tensor_cores = dtype != FLOAT32
    for chips in ((80,), (90, 100)):
        chip = tiles.CHIPS[chips[0] // 10, 0]
        kernel = decode_attention.decode_attention_kernel
        meta = decode_attention.decode_attention_meta(sizes, 16, window, ITEMSIZE[dtype], heads_per_group, chip)
        pointers = operands | sink | dict.fromkeys(("sequence_ptr", "position_ptr"), "*i32")
        pointers |= {"out_ptr": f"*{dtype}"} if sinks else dict.fromkeys(("out_ptr", "part_ptr"), "*fp32")
        types = types_of(kernel, meta, **pointers)
        yield Form(f"decode_attention {shape}", kernel, types, meta, uses_tensor_cores, chips=chips)
    kernel, meta = decode_attention.merge_chunks_kernel, decode_attention.merge_chunks_meta(sizes.value, window)
    pointers = {"sum_ptr": "*fp32", "part_ptr": "*fp32", "position_ptr": "*i32", "out_ptr": f"*{dtype}"} | sink
    yield Form(f"merge_chunks {shape}", kernel, types_of(kernel, meta, **pointers), meta)
    kernel = attention.prefill_attention_kernel
    pointers = operands | sink | {"query_start_ptr": "*i32", "context_ptr": "*i32", "out_ptr": f"*{dtype}"}
    for chips in ((80,), (90, 100)):
        chip = tiles.CHIPS[chips[0] // 10, 0]
        meta = attention.prefill_attention_meta(sizes, 16, window, ITEMSIZE[dtype], chip)
        types = types_of(kernel, meta, **pointers)
        yield Form(f"prefill_attention {shape}", kernel, types, meta, uses_tensor_cores, chips=chips)


def attention_shape(sizes: HeadSizes, window: int | None, heads_per_group: int, sinks: bool) -> str:
    """What the names of attention forms call a shape."""
    numbers = f"{sizes.key}" if sizes.key == sizes.value else f"{sizes.key}/{sizes.value}"
    shape = f"MLA {numbers} {heads_per_group} heads" if sizes.in_keys else f"heads of {numbers}"
    return shape + (f" window {window}" if window else "") + (" sinks" if sinks else "")


def all_forms() -> list[Form]:
    """Every tile, and the other kernels in shapes that open models have."""
    forms: list[Form] = []
    for dtype, some_tiles in TILES.items():
        forms += [*gemm_forms(dtype, some_tiles), *gemm_forms(dtype, some_tiles, gpt_oss=True), dense_gemm_form(dtype)]
    quantized_tiles = tiles.shipped_tiles(torch.bfloat16, quantized=True)
    for weights in FORMATS:
        forms += [*gemm_forms(BFLOAT16, quantized_tiles, weights=weights), dense_gemm_form(BFLOAT16, weights)]
        forms += gemm_forms(FLOAT32, tiles.TILES_32_BIT, weights=weights)
    forms += [tile_map_form(8), tile_map_form(512)]
    forms += [gate_form(8, 2, "softmax"), gate_form(128, 8, "softmax"), gate_form(512, 10, "softmax")]
    forms += [gate_form(64, 6, "softmax", bias=True)]
    forms += [gate_form(160, 8, "sigmoid", bias=True), gate_form(256, 8, "sigmoid", 8, 4, bias=True)]
    forms += [*group_forms(256, 128), *group_forms(131072, 256), *group_forms(131072, 8)]
    for dtype in (BFLOAT16, FLOAT32):
        forms += [*combine_forms(dtype), *row_forms(dtype)]
        for head_size in (64, 128, 256):
            forms += attention_forms(dtype, HeadSizes(head_size, head_size), None)
        forms += attention_forms(dtype, HeadSizes(128, 128), 4096)
        forms += attention_forms(dtype, HeadSizes(64, 64), 128, sinks=True)
        forms += attention_forms(dtype, HeadSizes(192, 128), None)
        for heads in (16, 128):
            forms += attention_forms(dtype, HeadSizes(576, 512, in_keys=True), None, heads_per_group=heads)
    for cache in CACHES:
        for sizes in (HeadSizes(64, 64, scales=1), HeadSizes(128, 128, scales=1), HeadSizes(256, 256, scales=1)):
            forms += attention_forms(BFLOAT16, sizes, None, cache=cache)
        for heads in (16, 128):
            sizes = HeadSizes(576, 512, in_keys=True, scales=2)
            forms += attention_forms(BFLOAT16, sizes, None, heads_per_group=heads, cache=cache)
    return forms


def one_tile_forms() -> list[Form]:
    """One form of each kernel, of attention two that are not alike."""
    return [
        *gemm_forms(BFLOAT16, tiles.TILES_16_BIT[4:5]),
        *gemm_forms(BFLOAT16, tiles.TILES_16_BIT[4:5], gpt_oss=True),
        dense_gemm_form(BFLOAT16),
        *(dense_gemm_form(BFLOAT16, weights) for weights in ("fp8", "nvfp4", "int4 zeros", "q4_k", "q6_k")),
        tile_map_form(512),
        gate_form(256, 8, "sigmoid", 8, 4, bias=True),
        *group_forms(131072, 256),
        *combine_forms(BFLOAT16),
        *list(row_forms(BFLOAT16))[2:],
        *attention_forms(BFLOAT16, HeadSizes(64, 64), 128, sinks=True),
        *attention_forms(BFLOAT16, HeadSizes(576, 512, in_keys=True), None, heads_per_group=128),
        *attention_forms(BFLOAT16, HeadSizes(576, 512, in_keys=True, scales=2), None, heads_per_group=128, cache="u8"),
    ]
