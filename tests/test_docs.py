"""Everything that the documentation names exists: relative links, and paths of files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOPS = ("moe_runtime/", "tests/", "scripts/", "docs/", "benchmarks/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    paths = [path for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if path.startswith(TOPS)]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []
