"""Settings that methods of quantisation have in common: bits, groups, blocks, and lists of modules. No torch."""

from __future__ import annotations

import re
from typing import Any

from moe_runtime.models.hf_config import HFConfig
from moe_runtime.types.weight_format import Code
from moe_runtime.weights.scheme import Rule, Storage

EVERY = ("",)  # patterns that match every module
HEAD = Rule(None, frozenset({"lm_head"}))  # most methods leave it as it is
INTEGERS = {4: Code.INT4, 8: Code.INT8}
END = r"(?=\.|$)"  # of a part of a module's name
# Beginnings of names where the language model is a part of a larger one, and what they are in the plain model.
OUTER = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.": ""}
LINEAR = "Linear"  # the class of all modules that are quantised here


def bits(hf: HFConfig, allowed: tuple[int, ...], *names: str) -> int:
    """Bits of a code."""
    value = hf.get(*names)
    if value not in allowed:
        raise hf.refusal(_spelling(hf, *names), value, " or ".join(map(str, allowed)))
    return int(value)


def group_size(hf: HFConfig, *names: str) -> int | None:
    """Inputs that share a scale; None: all of an output."""
    value = hf.get(*names, default=-1)
    if value == -1:
        return None
    if not _is_size(value) or value % 8:
        raise hf.refusal(_spelling(hf, *names), value, "-1 or a multiple of 8")
    return int(value)


def block_size(hf: HFConfig, name: str) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    value = hf.get(name)
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_size, value)) or value[1] % 8:
        raise hf.refusal(name, value, "a list of outputs and inputs, which must be a multiple of 8")
    return value[0], value[1]


def module_names(hf: HFConfig, *names: str) -> list[str]:
    """A list of modules, or of lists of them; absent and null are none."""
    value = hf.get(*names, default=[])
    flat: list[Any] = []
    for entry in value if isinstance(value, list) else [value]:
        flat += entry if isinstance(entry, list) else [entry]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in flat):
        raise hf.refusal(_spelling(hf, *names), value, "a list of names of modules")
    return [plain_name(name) for name in flat]


def plain_name(name: str) -> str:
    """A module of a larger model by its name in the language model alone."""
    outer = next((outer for outer in OUTER if name.startswith(outer)), "")
    return OUTER.get(outer, "") + name.removeprefix(outer)


def regex(hf: HFConfig, name: str, pattern: str) -> str:
    """A pattern for the beginnings of names, checked."""
    try:
        re.compile(f"(?:{pattern})")
    except re.error as error:
        raise hf.refusal(name, pattern, f"a regular expression ({error})") from None
    return pattern


def skipped(hf: HFConfig, *names: str) -> Rule:
    """Modules that transformers does not convert.

    A key is a pattern for the beginning of a name up to the end of a part, or the end of a name.
    """
    found, patterns = set(), []
    for key in module_names(hf, *names):
        if re.fullmatch(r"model\.[\w.]+", key):
            found.add(key)
        else:
            patterns += [rf"(?:{regex(hf, names[0], key)})(?:{END}|(?<=\.))", rf".*{re.escape(key)}$"]
    return Rule(None, frozenset(found), tuple(patterns))


def targets(hf: HFConfig, name: str, storage: Storage | None) -> Rule:
    """Modules as compressed-tensors names them: by name, by class, or with `re:` by a pattern."""
    found, patterns = set(), []
    for target in module_names(hf, name):
        if target == LINEAR:
            patterns.append("")
        elif target.startswith("re:"):
            patterns.append(regex(hf, name, target.removeprefix("re:")))
        else:
            found.add(target)
    return Rule(storage, frozenset(found), tuple(patterns))


def globs(hf: HFConfig, *names: str) -> Rule:
    """Modules that ModelOpt excludes, with all below them; `*` stands for any text."""
    found = module_names(hf, *names)
    patterns = (re.escape(name).replace(r"\*", ".*").replace(r"\?", ".") + END for name in found if "*" in name)
    return Rule(None, frozenset(name for name in found if "*" not in name), tuple(patterns))


def _spelling(hf: HFConfig, *names: str) -> str:
    return next((name for name in names if name in hf.values), names[0])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
