"""docs/errors.md and docs/headers.md are made from the code, and no error and no header is missing there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sglang_router
from sglang_router.admin import reference
from sglang_router.errors import RouterError

SOURCE = Path(sglang_router.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
COMMAND = "run: python -m sglang_router.admin.reference --"
FIELD = re.compile(r'(?<=["n])(x-[a-z][a-z0-9-]*[a-z0-9])(?="|: )')
"""A name at the beginning of a literal or of a line in it, written as \\n."""


@pytest.mark.parametrize(("page", "made"), [("errors", reference.errors), ("headers", reference.headers)])
def test_a_page_is_made_from_the_code(page: str, made: object) -> None:
    assert callable(made)
    assert (DOCS / f"{page}.md").read_text("utf-8") == made(), f"{COMMAND}{page} > docs/{page}.md"


def test_every_code_has_a_row() -> None:
    def classes(of: type[RouterError]) -> Iterator[type[RouterError]]:
        yield of
        for each in of.__subclasses__():
            yield from classes(each)

    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", reference.errors(), re.MULTILINE)
    assert set(rows) == {(str(each.status), each.code) for each in classes(RouterError) if "code" in vars(each)}
    assert len(rows) == len(set(rows))


def test_no_message_of_a_parent_stands_for_another_error() -> None:
    """A class without a message of its own is told with that of its parent; `unprocessable` may be, as invalid."""
    messages = re.findall(r"^\| \d+ \| `(\w+)` \| `\w+` \| (.*) \|$", reference.errors(), re.MULTILINE)
    said: dict[str, list[str]] = {}
    for code, message in messages:
        said.setdefault(message, []).append(code)
    assert [codes for codes in said.values() if len(codes) > 1] == [["invalid_request", "unprocessable"]]


def test_every_header_that_the_sources_name_has_a_row() -> None:
    named = {
        name
        for path in SOURCE.rglob("*.py")
        if "engine" not in path.relative_to(SOURCE).parts
        for name in FIELD.findall(path.read_text("utf-8"))
    }
    page = reference.headers()
    assert {"x-session-id", "x-sglang-router-decision", "x-sglang-router-signature", "x-request-id"} <= named
    assert [name for name in sorted(named) if f"`{name}`" not in page and f"`{name}*`" not in page] == []


def test_the_command_prints_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(["--errors"]) == 0
    assert capsys.readouterr().out == reference.errors()
    assert reference.main([]) == 2
    assert "usage:" in capsys.readouterr().err
