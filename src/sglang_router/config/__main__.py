"""`python -m sglang_router.config --markdown` prints `docs/options.md`, the page of all options; `--migrating` prints
the table of `docs/migrating.md`."""

from __future__ import annotations

import sys

from sglang_router.config.page import markdown, migrating_table

_PAGES = {"--markdown": markdown, "--migrating": migrating_table}

if __name__ == "__main__":
    make = _PAGES.get(" ".join(sys.argv[1:]))
    if make is None:
        sys.exit("usage: python -m sglang_router.config --markdown | --migrating")
    sys.stdout.write(make())
