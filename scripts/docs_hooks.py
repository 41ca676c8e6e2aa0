"""What mkdocs is told besides mkdocs.yml: patterns in the navigation, links that are no pages, marks of commands.

- An entry of the navigation with a `*` becomes all pages of that name that no other entry names, in order.
- A link to a file of the checkout outside docs/ (`../deploy/prometheus/alerts.yml`) works where the repository is
  shown, but not on the site. It becomes the file's name there; a file that does not exist is a warning, which ends a
  strict build.
- The text of a link that is only a page's file name becomes that page's title.
- What is folded (`<details>`) is Markdown, as it is where the repository is shown.
- What a console shows is not coloured: the rules for sessions of a shell take `2.4 %` for a prompt.
- A flag in a table gets a class, so that a browser does not break it behind its hyphens (docs/assets/site.css).
- The fence of a block of commands says how it is tested (`run=`, `no-test=`, `output=`): that is not for readers.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("mkdocs.hooks")
MARKS = re.compile(r"^( *`{3,}\w+)((?: +[a-z-]+=\"[^\"]*\")+) *$", re.MULTILINE)
TITLE = re.compile(r" title=\"[^\"]*\"")
PAGE = re.compile(r"\[[\w/-]+\.md\]\(([\w/.-]+\.md)((?:#[^)\s]*)?)\)")
OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")
FLAG = re.compile(r"<code>(--[\w-]+)</code>")


def on_config(config: Any) -> Any:
    """Replace the patterns of the navigation."""
    pages = sorted(_pages(config["docs_dir"]))
    named = set(_entries(config["nav"]))
    config["nav"] = _filled(config["nav"], [page for page in pages if page not in named])
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that lead out of docs/ into names of files, and leave of a fence's marks only its title."""
    folder = posixpath.dirname(page.file.src_uri)

    def name(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, link[2]))
        if path.startswith("docs/"):
            return link[0]
        root = os.path.dirname(config["config_file_path"])
        if path.startswith("..") or not os.path.exists(os.path.join(root, path)):
            log.warning("%s links to %s, which does not exist", page.file.src_uri, link[2])
        said = link[1].strip("`")
        return f"`{path}`" if said == path else f"{link[1]} (`{path}`)"

    def title(link: re.Match[str]) -> str:
        path = os.path.join(config["docs_dir"], folder, link[1])
        if not os.path.exists(path):
            return link[0]  # mkdocs warns of it
        with open(path, encoding="utf-8") as file:
            first = file.readline()
        return f"[{first.removeprefix('#').strip()}]({link[1]}{link[2]})"

    def fence(opened: re.Match[str]) -> str:
        return opened[1].replace("console", "text") + "".join(TITLE.findall(opened[2]))

    plain = MARKS.sub(fence, markdown).replace("\n<details>", '\n<details markdown="1">')
    return OUTSIDE.sub(name, PAGE.sub(title, plain))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Mark what is nothing but a flag."""
    return FLAG.sub(r'<code class="flag">\1</code>', html)


def _pages(folder: str) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".md"):
                yield os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")


def _entries(nav: Any) -> Iterator[str]:
    """All pages that a navigation names, and its patterns."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for each in nav.values():
            yield from _entries(each)
    else:
        for each in nav:
            yield from _entries(each)


def _filled(nav: Any, free: list[str]) -> Any:
    """Return a navigation in which pages stand for each pattern. free: pages that no entry names."""
    if isinstance(nav, dict):
        return {title: _filled(each, free) for title, each in nav.items()}
    if not isinstance(nav, list):
        return nav
    found: list[Any] = []
    for each in nav:
        found += fnmatch.filter(free, each) if isinstance(each, str) and "*" in each else [_filled(each, free)]
    return found
