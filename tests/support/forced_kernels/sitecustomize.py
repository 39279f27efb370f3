"""Native kernels as on an older processor, in every process that has this folder on its PYTHONPATH.

`MOE_RUNTIME_TEST_KERNELS` names the best instruction set to use, or is `off`. Python imports this file at its start.
Nothing changes until the runtime asks for the instruction sets.
"""

import importlib.abc
import importlib.machinery
import os
import sys

LIBRARY = "moe_runtime.kernels.cpu.library"


class Finder(importlib.abc.MetaPathFinder):
    """Removes instruction sets from the module that lists them, after that module has been imported."""

    def __init__(self, best):
        self.best = best

    def find_spec(self, name, path, target=None):
        if name != LIBRARY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            sets = module.INSTRUCTION_SETS
            assert self.best == "off" or self.best in sets, f"--kernels: {self.best!r} is none of {[*sets]}, off"
            for other in [*sets]:
                if other == self.best:
                    break
                del sets[other]

        spec.loader.exec_module = exec_module
        return spec


if best := os.environ.get("MOE_RUNTIME_TEST_KERNELS"):
    sys.meta_path.insert(0, Finder(best))
