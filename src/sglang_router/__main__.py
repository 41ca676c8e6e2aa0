"""`python -m sglang_router`: the console command."""

import sys

from sglang_router.cli import main

if __name__ == "__main__":
    sys.exit(main())
