"""`python -m sglang_router.config --markdown` prints `docs/options.md`, the page of all options."""

from __future__ import annotations

import sys

from sglang_router.config.page import markdown

if __name__ == "__main__":
    if sys.argv[1:] != ["--markdown"]:
        sys.exit("usage: python -m sglang_router.config --markdown")
    sys.stdout.write(markdown())
