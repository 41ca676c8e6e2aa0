"""Write tables into a page, between markers."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def write_tables(name: str, text: str, page: Path = PAGE) -> None:
    """Put `text` between the markers `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises: ValueError if the page does not have them.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page.name} has no markers for {name}")
    page.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}")
