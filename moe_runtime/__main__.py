"""`python -m moe_runtime` runs the `moe-runtime` command."""

import sys

from moe_runtime.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
