"""How tests are distributed over the workers of a run."""

from __future__ import annotations

from places import ROOT
from xdist.scheduler import LoadScopeScheduling


class ByFile(LoadScopeScheduling):
    """A file's tests run on one worker, which makes its fixtures once; all files with rank pools share one worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ranks" if "rank_pool" in (ROOT / file).read_text() else file
