"""The documentation's site, as far as it can be checked without building it (`sh scripts/docs` does): every page has a
place, every link leads somewhere, here and where the repository is shown, and the hooks of mkdocs do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from scripts import docs_hooks

from documented import DOCUMENTS, ROOT

DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def settings() -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    return found | {"docs_dir": str(DOCS), "config_file_path": str(ROOT / "mkdocs.yml")}


def plain(text: str) -> str:
    """Return a text without its fenced blocks, in which nothing is a heading or a link."""
    return re.sub(r"^( *`{3,}).*?^\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Return the anchors of headings that GitHub and mkdocs make alike."""
    headings = re.findall(r"^#+ (.*)$", plain(document.read_text("utf-8")), re.MULTILINE)
    words = [
        re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each)).strip().lower() for each in headings
    ]
    return {each.replace(" ", "-") for each in words if each.replace(" ", "-") == re.sub(r"[-\s]+", "-", each)}


def test_every_page_has_its_place() -> None:
    nav = docs_hooks.on_config(settings())["nav"]
    named = list(docs_hooks._entries(nav))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert [page for page in sorted(pages) if page not in named] == [], "add it to nav in mkdocs.yml"
    assert [page for page in named if named.count(page) > 1 or page not in pages] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_link_leads_somewhere(document: Path) -> None:
    for link in LINK.findall(plain(document.read_text("utf-8"))):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}: no such heading, or its anchor differs between sites"


def broken_lists(text: str) -> list[str]:
    """Return the lines by which a list ends on the site, and not where the repository is shown.

    mkdocs takes what stands below an item for a part of it from four columns on.
    """
    found, fenced, before = list[str](), False, ""
    for line in text.splitlines():
        inside = 0 < len(line) - len(line.lstrip()) < 4
        fence = line.lstrip().startswith("```")
        if inside and (fence or (not fenced and (not before.strip() or re.match(r" +[-*|] ", line)))):
            found.append(line)
        fenced ^= fence
        before = line
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_list_is_one_list_on_the_site(document: Path) -> None:
    assert broken_lists(document.read_text("utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_comment_stands_in_a_table(document: Path) -> None:
    """The table would end there, and what follows be shown as it is written."""
    assert re.findall(r"^\|.*\n<!--.*\n(\|.*)", document.read_text("utf-8"), re.MULTILINE) == []


def test_a_broken_list_is_found() -> None:
    whole = "1. one\n   goes on\n\n    | a | b |\n\n    ```sh\n  $ x\n    ```\n2. two\n    - nested\n"
    assert broken_lists(whole) == []
    broken = "1. one\n\n   | a |\n2. two\n\n   more\n- three\n  - nested\n\n   ```sh\n   ```\n"
    assert [line.split()[0] for line in broken_lists(broken)] == ["|", "more", "-", "```sh", "```"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_picture_says_what_it_shows(document: Path) -> None:
    """For those who do not see it."""
    said = re.findall(r"!\[([^\]]*)\]\(", plain(document.read_text("utf-8")))
    assert [words for words in said if len(words.split()) < 3] == []


def test_a_pattern_stands_for_the_pages_that_nobody_names(tmp_path: Path) -> None:
    for name in ("index", "deploy-a", "deploy-b", "other"):
        (tmp_path / f"{name}.md").write_text("# Title\n")
    nav = [{"Start": ["index.md"]}, {"Deploy": ["deploy-b.md", "deploy-*.md", "none-*.md"]}]
    found = docs_hooks.on_config({"docs_dir": str(tmp_path), "nav": nav})["nav"]
    assert found == [{"Start": ["index.md"]}, {"Deploy": ["deploy-b.md", "deploy-a.md"]}]


def test_a_reader_of_the_site_sees_titles_names_and_no_marks() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="decisions/0001-framing.md"))
    text = (
        "[errors.md](../errors.md#x) [the rules](../../deploy/prometheus/alerts.yml) [this](../errors.md)\n"
        '```console run="always" output="exact"\n$ true\n```\n```yaml title="a.yaml"\na: 1\n```\n'
        "\n<details><summary>more</summary>\n\n| a |\n"
    )
    assert docs_hooks.on_page_markdown(text, page, settings(), None) == (
        "[Errors](../errors.md#x) the rules (`deploy/prometheus/alerts.yml`) [this](../errors.md)\n"
        '```text\n$ true\n```\n```yaml title="a.yaml"\na: 1\n```\n'
        '\n<details markdown="1"><summary>more</summary>\n\n| a |\n'
    )


def test_a_flag_is_marked() -> None:
    html = "<td><code>--a-flag</code>, <code>--port 1</code></td>"
    marked = '<td><code class="flag">--a-flag</code>, <code>--port 1</code></td>'
    assert docs_hooks.on_page_content(html, None, None, None) == marked


def test_a_file_that_is_not_there_ends_the_build(caplog: pytest.LogCaptureFixture) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    docs_hooks.on_page_markdown("[it](../deploy/nothing.yml)", page, settings(), None)
    assert "page.md links to ../deploy/nothing.yml, which does not exist" in caplog.text
