"""Abuses a server in every way that is listed, and checks that it goes on serving or ends with one clear line.

    python scripts/check_abuse.py [--only NAME ...] [--out docs/security.md]

Needs root, for mounts in a namespace of its own; nothing of the machine is changed. Prints a table of the cases, which
`--out` writes between the marks of that page. Exits with 1 if a case has not ended as it must.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # needed if PYTHONSAFEPATH is set
from abuse import clients, machine, processes
from abuse.tools import CaseError, answer
from served.server import Server

BEGIN, END = "<!-- check_abuse begins -->", "<!-- check_abuse ends -->"
FAILURES = (CaseError, OSError, RuntimeError, subprocess.TimeoutExpired)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--out", type=Path, help="page whose table is replaced")
    options = parser.parse_args()

    def asked(case: Callable[..., str]) -> bool:
        return not options.only or case.__name__ in options.only

    lines, failed = ["| abuse | what happens |", "|---|---|"], []

    def run(case: Callable[..., str], *arguments: object) -> None:
        try:
            outcome = case(*arguments)
        except FAILURES as error:
            failed.append(case.__name__)
            outcome = f"FAILED: {error}"
        lines.append(f"| {(case.__doc__ or '').strip()} | {outcome} |")
        print(f"{case.__name__}: {outcome}", flush=True)

    if any(map(asked, clients.CASES)):
        with Server("demo", *clients.FLAGS) as server:
            known = answer(server)
            for case in filter(asked, clients.CASES):
                run(case, server, known)
            run(partial_stop(server))
    for own in filter(asked, (*processes.CASES, *machine.CASES)):
        run(own)
    if options.out is not None and not failed:
        page = options.out.read_text()
        table = "\n".join(lines)
        options.out.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.S))
    print(f"failed: {', '.join(failed)}" if failed else "all is well")
    return int(bool(failed))


def partial_stop(server: Server) -> Callable[[], str]:
    def ends() -> str:
        """SIGTERM after all of these"""
        code = server.stop()
        if code:
            raise CaseError(f"exit code {code}")
        return "exit code 0"

    return ends


if __name__ == "__main__":
    raise SystemExit(main())
