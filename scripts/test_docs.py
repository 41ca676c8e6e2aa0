"""Follow the pages of the documentation as a reader does (`sh scripts/test-docs`): see `documented`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from documented import DOCUMENTS, SHELLS, WITHIN, blocks, walk


def follow(page: Path) -> str:
    """Run all blocks of a page that are run anywhere; return what is wrong, or "".

    Ends with the first mistake: what comes after it may depend on it.
    """
    with tempfile.TemporaryDirectory() as folder, walk(Path(folder), WITHIN * 10) as reader:
        try:
            for block in blocks(page):
                if block.run or "title" in block.marks:
                    reader.follow(block)
        except AssertionError as error:
            return str(error)
    return ""


def main(names: Sequence[str]) -> int:
    """Follow the pages with these names (without .md), or all; return the exit status."""
    unknown = set(names) - {page.stem for page in DOCUMENTS}
    if unknown:
        print(f"error: there is no page {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    failed = 0
    for page in DOCUMENTS:
        shells = [block for block in blocks(page) if block.language in SHELLS]
        run = sum(1 for block in shells if block.run)
        if not run or (names and page.stem not in names):
            continue
        began = time.monotonic()
        wrong = follow(page)
        failed += bool(wrong)
        seconds = time.monotonic() - began
        print(
            f"{'FAILED' if wrong else 'ok':<7}{page.name:<22}{run:>3} of {len(shells)} blocks  {seconds:5.1f} s",
            flush=True,
        )
        if wrong:
            print(wrong, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
