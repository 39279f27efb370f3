"""Imports go one way: cli, launch, serve, the engine and the rest, experts and all2all, kernels; balancer is alone."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import moe_runtime

PACKAGE = Path(moe_runtime.__file__).parent
LEAVES = {
    "kernels": {"kernels"},
    "experts": {"experts", "kernels"},
    "all2all": {"all2all", "kernels"},
    "balancer": {"balancer"},
}
TOP = {
    "bench",
    "cli",
    "cli_bench",
    "cli_calibrate",
    "cli_generate",
    "cli_inspect",
    "cli_plan",
    "cli_tune",
    "launch",
    "__main__",
}
TORCH_FREE = """
bench.options bench.workload block_pool budget build cli cli_bench cli_calibrate cli_inspect cli_plan cli_tune config
detokenizer engine executor host launch llm load_monitor messages migration migration_rounds model_size models
models.hf_config mover options outputs placements planner.choices planner.exchange planner.hardware
planner.hardware_file planner.measure planner.measure_engine planner.plot planner.predict planner.report
planner.routing planner.shape rank_group rebalancer request routes routing sampling_params scheduler trace_recorder
transport
""".split()  # noqa: SIM905
OPTIONAL_IN_PROCESS = ["zmq", "msgspec", "fastapi", "pydantic", "uvicorn", "starlette", "matplotlib"]


def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its name below `moe_runtime`."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(file.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    """What a module imports, wherever in it; names below `moe_runtime` without the prefix."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


OURS = modules()


def part_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", OURS)
def test_imports_go_one_way(module: str) -> None:
    ours = {name.removeprefix("moe_runtime.") for name in imports(OURS[module]) if name.startswith("moe_runtime.")}
    parts = {part_of(name) for name in ours} - {"__version__"}
    here = part_of(module)
    if here in LEAVES:
        assert parts <= LEAVES[here], f"{module} may import only {LEAVES[here]}"
    if here not in TOP | {"serve"}:
        assert "serve" not in parts, f"{module} is below serve"
    if here not in TOP:
        assert not parts & TOP, f"{module} is below the command line and the launcher"


@pytest.mark.parametrize("module", OURS)
def test_top_level_links_are_never_import_names(module: str) -> None:
    links = {"experts", "all2all", "balancer", "kernels", "serve"}
    assert not {part_of(name) for name in imports(OURS[module])} & links


def run(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planning_and_hosts_import_no_torch() -> None:
    run(
        f"import importlib, sys\nfor name in {TORCH_FREE}: importlib.import_module('moe_runtime.' + name)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )


def test_importing_the_package_is_light() -> None:
    run("import moe_runtime, sys; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)")


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_one_rank_in_process_needs_no_server_packages(tmp_path: Path, load_format: str) -> None:
    from tiny_models import make_model, save

    save(make_model("qwen3"), tmp_path)
    if load_format == "dummy":
        for file in [*tmp_path.iterdir()]:
            if file.name != "config.json":
                file.unlink()
    run(
        f"import sys\nfor name in {OPTIONAL_IN_PROCESS}: sys.modules[name] = None\n"
        "from moe_runtime import LLM, SamplingParams\n"
        f"with LLM({str(tmp_path)!r}, skip_tokenizer_init=True, load_format={load_format!r}) as llm:\n"
        "    params = SamplingParams(max_tokens=4, ignore_eos=True)\n"
        "    out = llm.generate({'prompt_token_ids': [3, 4, 5]}, params, use_tqdm=False)\n"
        "    assert len(out[0].outputs[0].token_ids) == 4\n"
        "    assert llm.expert_load().tokens['prefill'].sum() == 3 * 3 * 3"
    )


def test_transformers_from_the_root_does_not_find_our_kernels() -> None:
    """`kernels` is another package's name, and transformers imports it if it finds one; our link must not be it."""
    root = PACKAGE.parent
    assert (root / "kernels").is_symlink()
    run(
        "import sys; sys.path.insert(0, '')\n"
        "from transformers.models.glm4_moe import modeling_glm4_moe\n"
        "assert not [name for name in sys.modules if name.startswith('kernels.')], 'our link was imported'",
        cwd=root,
    )


def test_our_folders_are_not_importable_by_their_short_names() -> None:
    """Not in the tests' own process either, whose paths pytest sets."""
    for name in ("experts", "all2all", "balancer", "kernels", "serve"):
        assert importlib.util.find_spec(name) is None
