"""The quick commands of the documents are run as they stand: see `documented`. The others: `sh scripts/test-docs`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from documented import ALWAYS, DOCUMENTS, blocks, walk

PAGES = [document for document in DOCUMENTS if any(block.run == ALWAYS for block in blocks(document))]


@pytest.mark.skipif(shutil.which("curl") is None, reason="the pages use curl")
@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_a_reader_can_follow_the_page(document: Path, tmp_path: Path) -> None:
    with walk(tmp_path) as reader:
        for block in blocks(document):
            if block.run == ALWAYS or "title" in block.marks:
                reader.follow(block)


def test_there_is_something_to_follow() -> None:
    assert {"quickstart.md", "tuning.md", "troubleshooting.md"} <= {page.name for page in PAGES}
