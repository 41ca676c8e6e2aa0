"""Results go into the page between its marks, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.benchmark import documents
from scripts.benchmark.processes import BenchError

from bench_samples import results, sample


def marked(*names: str) -> str:
    return "# Page\n\n" + "\n".join(f"<!-- bench: {name} -->\nold\n<!-- end of bench -->\ntext" for name in names)


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = documents.replaced(marked("tables", "goals"), {"goals": r"new \1"})
    assert page == marked("tables", "goals").replace(
        "<!-- bench: goals -->\nold\n", "<!-- bench: goals -->\n\nnew \\1\n\n"
    )


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(BenchError, match="no marks for losses"):
        documents.replaced(marked("tables"), {"losses": "new"})


def test_the_page_of_this_project_has_all_marks(tmp_path: Path) -> None:
    made = results(_4kB={"ours": [sample()], "reference": [sample(cpu=100)], "haproxy": [sample(cpu=10)]})
    page = tmp_path / "page.md"
    page.write_text(documents.PAGE.read_text())
    documents.write(page, made)
    assert "commit abc. Medians of 3 rounds of 2 s." in page.read_text()
    assert "- HAProxy 2 is better, of 1 load: CPU 1." in page.read_text()
    documents.write(page, made)
    assert page.read_text().count("- HAProxy 2 is better") == 1
