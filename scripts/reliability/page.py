"""Write tables into a page, between markers."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def write_tables(name: str, text: str) -> None:
    """Put `text` between the markers `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises: ValueError if the page does not have them.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, found, rest = PAGE.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{PAGE.name} has no markers for {name}")
    PAGE.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}")
