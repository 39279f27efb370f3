"""Compile every shipped form of the Triton kernels for each generation of chip, without a GPU, and check the result.

Registers and spills are those that ptxas reports for the binary that would run. The check fails if a kernel spills
registers, needs more shared memory than a chip has, or does not use its generation's tensor cores. No times are
measured.

    python scripts/check_kernels.py [--json | --write docs/kernels.md] [--one-tile] [--only NAME]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_runtime.kernels.triton import tiles

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from kernel_check.forms import Form, all_forms, one_tile_forms

# Compute capability -> shared memory of one program, bytes, and the tensor-core instruction of its generation.
# The form of 8.0 also represents 8.6, 8.9 and 12.0, whose tensor cores are used in the same way.
CHIPS = {80: (163 * 1024, "mma.sync"), 90: (227 * 1024, "wgmma"), 100: (227 * 1024, "tcgen05.mma")}
MIN_ROWS_OF_NEW_TENSOR_CORES = 64  # wgmma and tcgen05 multiply at least 64 rows; fewer go through mma.sync
BEGIN, END = "<!-- check_kernels.py writes from here -->\n", "<!-- to here -->\n"


@dataclasses.dataclass(frozen=True)
class Report:
    """The compilation result of one form on one chip, and its problems."""

    form: str
    chip: str
    num_registers: int
    num_spill_bytes: int
    num_shared_bytes: int
    tensor_core: str
    problems: list[str]


def compile_form(form: Form, capability: int) -> Report:
    """Compile for a chip, as a launch with shapes divisible by 16 would."""
    names = form.kernel.arg_names
    signature = {name: form.types.get(name, "constexpr") for name in names}
    # The compiler knows no divisibility of arguments that are not shapes.
    shapes = ("_ptr", "_features", "_stride", "_size", "hidden")
    divisible = [i for i, name in enumerate(names) if name.endswith(shapes) and name in form.types]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    constants = {(names.index(name),): value for name, value in form.constants.items()}
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
    """The problems that make this form unfit to ship."""
    problems = []
    if report.num_spill_bytes:
        problems.append(f"spills {report.num_spill_bytes} bytes")
    smallest = min(chip.shared_bytes for chip in tiles.CHIPS.values())
    if tensor_core == "mma.sync" and form.needed_shared <= smallest:
        shared_limit = smallest
    if report.num_shared_bytes > shared_limit:
        problems.append(f"needs {report.num_shared_bytes} bytes of shared memory")
    if form.uses_tensor_cores:
        expected = tensor_core if form.meta["BLOCK_M"] >= MIN_ROWS_OF_NEW_TENSOR_CORES else "mma.sync"
        if report.tensor_core != expected:
            problems.append(f"multiplies with {report.tensor_core} instead of {expected}")
    return problems


def is_offered(form: Form, capability: int) -> bool:
    """Whether a wrapper ever chooses this form on a chip."""
    return capability in form.chips and form.needed_shared <= CHIPS[capability][0]


def table(reports: list[Report]) -> str:
    """A row per form; registers, shared KB and tensor-core instruction per chip."""
    chips = [f"sm_{capability}" for capability in CHIPS]
    lines = [f"| form | {' | '.join(chips)} |", f"|---|{'---|' * len(chips)}"]
    found = {(report.form, report.chip): report for report in reports}
    for form in dict.fromkeys(report.form for report in reports):
        cells = []
        for chip in chips:
            if (report := found.get((form, chip))) is None:
                cells.append("not offered")
                continue
            cell = f"{report.num_registers} reg, {report.num_shared_bytes / 1024:.1f} KB"
            cell += f", {report.tensor_core}" if report.tensor_core != "-" else ""
            cells.append(cell + "".join(f", **{problem}**" for problem in report.problems))
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(page: Path, text: str) -> None:
    """Write the table between the markers of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"--write: {page} is not allowed; it must have the lines {BEGIN.strip()!r} and {END.strip()!r}"
        )
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a list of reports instead of a table")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    parser.add_argument("--one-tile", action="store_true", help="one form of each kernel instead of all")
    parser.add_argument("--only", default="", metavar="NAME", help="only forms whose name begins so")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set; the interpreter and the compiler exclude each other")
    triton.knobs.compilation.always_compile = True  # a cached kernel has no ptxas log
    triton.knobs.nvidia.dump_ptxas_log = True

    forms = [form for form in (one_tile_forms() if args.one_tile else all_forms()) if form.name.startswith(args.only)]
    reports = [compile_form(form, chip) for form in forms for chip in CHIPS if is_offered(form, chip)]
    if args.json:
        json.dump([dataclasses.asdict(report) for report in reports], sys.stdout, indent=1)
    else:
        print(table(reports), end="")
    if args.write:
        write_table(args.write, f"Triton {triton.__version__}.\n\n{table(reports)}")
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
