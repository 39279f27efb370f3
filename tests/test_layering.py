"""Rooms and the edges between them: allowed imports, no cycles, and modules that must not be imported at all."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

import moe_runtime

PACKAGE = Path(moe_runtime.__file__).parent
# A room, and the rooms that it may use; docs/architecture.md shows the same lines. Files at the root are rooms too.
EDGES = """
types             ->
system            ->
config            -> types system
kernels           -> types system
experts           -> types kernels
grammars          -> types
all2all           -> kernels
balancer          -> system
wire              -> types config
text              -> types weights
memory            -> types config balancer kernels
demo              -> system
weights           -> types config system kernels demo
layers            -> types system config wire memory kernels experts all2all
models            -> types config balancer kernels experts all2all layers weights
worker            -> types system config wire memory kernels experts all2all grammars layers models weights
balancer.live     -> config wire memory balancer
engine            -> types config wire text memory balancer balancer.live grammars
cluster           -> types system config wire all2all worker
build             -> config wire text memory models weights demo engine cluster
llm               -> types config build balancer balancer.live
serve             -> types system config wire text engine balancer balancer.live grammars
bench             -> types config wire text models weights engine build serve
planner           -> types system config memory balancer kernels layers models worker engine build
cli               -> types system config wire text memory balancer kernels models weights worker engine cluster build serve bench planner
__init__          -> types llm
__main__          -> cli
"""  # noqa: E501
# Rooms whose modules import no torch, and what else does not.
TORCH_FREE_ROOMS = """
types system config balancer balancer.live grammars text wire memory engine cluster build llm serve bench cli
""".split()  # noqa: SIM905
TORCH_FREE_BESIDES = """
models.gguf_config models.gguf_metadata models.gguf_names models.hf_config models.quantization models.registry
planner.choices planner.exchange planner.hardware planner.hardware_file planner.measure planner.measure_engine
planner.plot planner.predict planner.report planner.routing planner.shape weights.scheme
""".split()  # noqa: SIM905
WITH_TORCH = {"cluster.in_process"}
OPTIONAL_IN_PROCESS = ["zmq", "msgspec", "fastapi", "pydantic", "uvicorn", "starlette", "matplotlib"]

Graph = dict[str, set[str]]


@functools.cache
def sources() -> dict[str, str]:
    """The text of every module of the package, by its name below `moe_runtime`; the package itself is `__init__`."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__") or "__init__"] = file.read_text()
    return found


@functools.cache
def imported_names(text: str) -> set[str]:
    """What a module imports, wherever in it: also in functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def graph_of(texts: Mapping[str, str]) -> Graph:
    """The modules of the package that each of them imports."""

    def module_of(name: str) -> str:
        below = name.removeprefix("moe_runtime").lstrip(".")
        while below and below not in texts:
            below = below.rpartition(".")[0]
        return below or "__init__"

    def ours(text: str) -> set[str]:
        names = imported_names(text)
        return {module_of(name) for name in names if name.partition(".")[0] == "moe_runtime"}

    return {module: ours(text) - {module} for module, text in texts.items()}


def room_of(module: str) -> str:
    return "balancer.live" if module.startswith("balancer.live") else module.partition(".")[0]


def read_table(text: str) -> Graph:
    lines = (line.partition("->") for line in text.splitlines() if "->" in line)
    return {room.strip(): set(used.split()) for room, _, used in lines}


def rooms_of(graph: Graph) -> Graph:
    """The rooms that each room uses."""
    rooms: Graph = {room_of(module): set() for module in graph}
    for module, used in graph.items():
        rooms[room_of(module)] |= {room_of(name) for name in used} - {room_of(module)}
    return rooms


def circle_in(graph: Graph) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def breaches(graph: Graph, table: Graph) -> list[str]:
    """Imports that the table does not allow, as "module -> module"."""
    return [
        f"{module} -> {name}"
        for module, used in sorted(graph.items())
        for name in sorted(used)
        if room_of(name) != room_of(module) and room_of(name) not in table.get(room_of(module), set())
    ]


def test_no_edge_that_is_not_in_the_table() -> None:
    assert breaches(graph_of(sources()), read_table(EDGES)) == []


def test_the_table_has_no_room_and_no_edge_that_does_not_exist() -> None:
    assert rooms_of(graph_of(sources())) == read_table(EDGES)


def test_no_circles_between_rooms_and_none_between_files() -> None:
    graph = graph_of(sources())
    assert circle_in(rooms_of(graph)) == []
    assert circle_in(graph) == []


def test_the_architecture_page_shows_the_same_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert read_table(EDGES) in [read_table(block) for block in blocks]


@pytest.mark.parametrize(
    "text",
    [
        "import moe_runtime.b.two",
        "from moe_runtime.b import two",
        "from moe_runtime.b.two import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moe_runtime.b.two import name",
        "def function():\n    def inner():\n        from moe_runtime.b import two",
    ],
)
def test_an_edge_and_a_circle_are_found_wherever_the_import_stands(text: str) -> None:
    graph = graph_of({"a": "", "a.one": text, "b": "", "b.two": ""})
    assert breaches(graph, {"a": set(), "b": set()}) == ["a.one -> b.two"]
    assert breaches(graph, {"a": {"b"}, "b": set()}) == []
    assert circle_in(graph) == []
    graph = graph_of({"a": "", "a.one": text, "a.three": "", "b": "", "b.two": "import moe_runtime.a.three"})
    assert circle_in(graph) == [] and sorted(set(circle_in(rooms_of(graph)))) == ["a", "b"]
    graph = graph_of({"a": "", "a.one": text, "b": "", "b.two": "import moe_runtime.a.one"})
    assert sorted(set(circle_in(graph))) == ["a.one", "b.two"]


def test_top_level_links_are_never_import_names() -> None:
    links = {"experts", "all2all", "balancer", "kernels", "serve"}
    for module, text in sources().items():
        assert not {name.partition(".")[0] for name in imported_names(text)} & links, module


def run(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planning_serving_and_hosts_import_no_torch() -> None:
    names = [module for module in sources() if room_of(module) in TORCH_FREE_ROOMS and module not in WITH_TORCH]
    run(
        f"import importlib, sys\nfor name in {[*names, *TORCH_FREE_BESIDES]}: "
        "importlib.import_module('moe_runtime.' + name)\n"
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
