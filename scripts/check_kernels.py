"""Compile every shipped form of the Triton kernels for each generation of chip, without a GPU, and check the result.

Registers and spills are what ptxas reports for the very binary that would be loaded. Fails if a kernel spills
registers, asks for more shared memory than a chip has, or misses the tensor cores of its generation. Measures no times.

    python scripts/check_kernels.py [--json] [--one-tile]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_runtime.kernels.torch_ops import Scoring
from moe_runtime.kernels.triton import gate, grouped_gemm

# Compute capability -> shared memory of one program, bytes, and the tensor-core instruction of its generation.
CHIPS = {80: (163 * 1024, "mma.sync"), 90: (227 * 1024, "wgmma"), 100: (227 * 1024, "tcgen05.mma")}
SMALLEST_CHIP_SHARED = 99 * 1024  # 8.6, 8.9 and 12.0, which run the same tiles
MIN_ROWS_OF_NEW_TENSOR_CORES = 64  # wgmma and tcgen05 multiply at least 64 rows; fewer go through mma.sync
BFLOAT16 = "bf16"
FLOAT32 = "fp32"


@dataclasses.dataclass(frozen=True)
class Form:
    """One specialisation of a kernel: types of its arguments, and its constants and launch options together."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    meta: dict[str, int]
    uses_tensor_cores: bool = False

    @property
    def constants(self) -> dict[str, int | None]:
        """Values of the constexpr parameters; a pointer that has no type is `None`."""
        return {name: self.meta.get(name) for name in self.kernel.arg_names if name not in self.types}

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {name: value for name, value in self.meta.items() if name not in self.kernel.arg_names}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one form became on one chip, and what is wrong with it."""

    form: str
    chip: str
    num_registers: int
    num_spill_bytes: int
    num_shared_bytes: int
    tensor_core: str
    problems: list[str]


def gemm_forms(dtype: str, tiles: tuple[grouped_gemm.Tile, ...]) -> Iterator[Form]:
    """Both products of the expert MLP in each tile."""
    types = dict.fromkeys(("x_ptr", "w_ptr", "out_ptr"), f"*{dtype}")
    types |= {"tile_ptr": "*i32", "in_features": "i32", "out_features": "i32"}
    for tile in tiles:
        for swiglu in (True, False):
            yield Form(
                f"grouped_gemm {'gate+up' if swiglu else 'down'} {dtype} {tile.block_m}x{tile.block_n}x{tile.block_k}"
                f" {tile.num_warps} warps {tile.num_stages} stages",
                grouped_gemm.grouped_gemm_kernel,
                types | ({"row_ptr": "*i64"} if swiglu else {}),
                grouped_gemm.grouped_gemm_meta(tile, swiglu=swiglu),
                uses_tensor_cores=dtype != FLOAT32,
            )


def tile_map_form(num_slots: int) -> Form:
    """The map from tiles to slots."""
    types = {"counts_ptr": "*i64", "tile_ptr": "*i32", "num_slots": "i32", "num_rows": "i32", "num_tiles": "i32"}
    meta = grouped_gemm.tile_map_meta(grouped_gemm.TILES_16_BIT[-1], num_slots)
    return Form(f"tile_map {num_slots} slots", grouped_gemm.tile_map_kernel, types, meta)


def gate_form(num_experts: int, top_k: int, scoring: Scoring, num_groups: int = 1, topk_groups: int = 1) -> Form:
    """A gate; sigmoid gates have a correction bias."""
    types = {"logits_ptr": "*fp32", "weights_ptr": "*fp32", "experts_ptr": "*i64", "group_size": "i32", "scale": "fp32"}
    if scoring == "sigmoid":
        types["bias_ptr"] = "*fp32"
    meta = gate.topk_gate_meta(
        num_experts, top_k=top_k, scoring=scoring, num_groups=num_groups, topk_groups=topk_groups, normalize=True
    )
    groups = f" {topk_groups} of {num_groups} groups" if num_groups > 1 else ""
    return Form(f"topk_gate {scoring} {top_k} of {num_experts}{groups}", gate.topk_gate_kernel, types, meta)


def all_forms() -> list[Form]:
    """Every tile, and gates of the shapes that open models have."""
    return [
        *gemm_forms(BFLOAT16, grouped_gemm.TILES_16_BIT),
        *gemm_forms("fp16", grouped_gemm.TILES_16_BIT),
        *gemm_forms(FLOAT32, grouped_gemm.TILES_32_BIT),
        tile_map_form(8),
        tile_map_form(512),
        gate_form(8, 2, "softmax"),
        gate_form(128, 8, "softmax"),
        gate_form(512, 10, "softmax"),
        gate_form(160, 8, "sigmoid"),
        gate_form(256, 8, "sigmoid", 8, 4),
    ]


def one_tile_forms() -> list[Form]:
    """One form of each kernel."""
    return [
        *gemm_forms(BFLOAT16, grouped_gemm.TILES_16_BIT[-1:]),
        tile_map_form(512),
        gate_form(256, 8, "sigmoid", 8, 4),
    ]


def compile_form(form: Form, capability: int) -> Report:
    """Compile for a chip, as a launch with shapes divisible by 16 would."""
    constants = form.constants
    names = form.kernel.arg_names
    signature = {name: form.types.get(name, "constexpr") for name in names}
    # Of numbers that are no shape the compiler knows nothing.
    divisible = [i for i, name in enumerate(names) if "_ptr" in name or "_features" in name]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible if names[i] in form.types}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(form.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options=form.options,
        )
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert registers and spills, log.getvalue()
    ptx = compiled.asm["ptx"]
    report = Report(
        form=form.name,
        chip=f"sm_{capability}",
        num_registers=int(registers[1]),
        num_spill_bytes=int(spills[1]) + int(spills[2]),
        num_shared_bytes=compiled.metadata.shared,
        tensor_core=next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "-"),
        problems=[],
    )
    return dataclasses.replace(report, problems=find_problems(form, report, *CHIPS[capability]))


def find_problems(form: Form, report: Report, shared_limit: int, tensor_core: str) -> list[str]:
    """What makes this form unfit to ship."""
    problems = []
    if report.num_spill_bytes:
        problems.append(f"spills {report.num_spill_bytes} bytes")
    if report.num_shared_bytes > min(shared_limit, SMALLEST_CHIP_SHARED):
        problems.append(f"needs {report.num_shared_bytes} bytes of shared memory")
    if form.uses_tensor_cores:
        expected = tensor_core if form.meta["BLOCK_M"] >= MIN_ROWS_OF_NEW_TENSOR_CORES else "mma.sync"
        if report.tensor_core != expected:
            problems.append(f"multiplies with {report.tensor_core} instead of {expected}")
    return problems


def print_table(reports: list[Report]) -> None:
    """A row per form; registers, shared KB and tensor-core instruction per chip."""
    chips = [f"sm_{capability}" for capability in CHIPS]
    print(f"| form | {' | '.join(chips)} |")
    print(f"|---|{'---|' * len(chips)}")
    for form in dict.fromkeys(report.form for report in reports):
        cells = []
        for report in (report for report in reports if report.form == form):
            cell = f"{report.num_registers} reg, {report.num_shared_bytes / 1024:.1f} KB"
            cell += f", {report.tensor_core}" if report.tensor_core != "-" else ""
            cells.append(cell + "".join(f", **{problem}**" for problem in report.problems))
        print(f"| {form} | {' | '.join(cells)} |")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a list of reports instead of a table")
    parser.add_argument("--one-tile", action="store_true", help="one form of each kernel instead of all")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set; the interpreter and the compiler exclude each other")
    triton.knobs.compilation.always_compile = True  # a cached kernel has no log of ptxas
    triton.knobs.nvidia.dump_ptxas_log = True

    forms = one_tile_forms() if args.one_tile else all_forms()
    reports = [compile_form(form, capability) for form in forms for capability in CHIPS]
    if args.json:
        json.dump([dataclasses.asdict(report) for report in reports], sys.stdout, indent=1)
    else:
        print_table(reports)
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
