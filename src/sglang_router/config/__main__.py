"""`python -m sglang_router.config --markdown` prints the page of all options, `docs/options.md`."""

from __future__ import annotations

import sys

from sglang_router.config.page import markdown

if __name__ == "__main__":
    if sys.argv[1:] != ["--markdown"]:
        sys.exit("usage: python -m sglang_router.config --markdown")
    sys.stdout.write(markdown())
