"""Every command in the documents says how it is proved, and names only programs, files and flags that exist."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from documented import ALWAYS, BY_HAND, DOCUMENTS, ROOT, SHELLS, Block, alike, blocks, commands, unfenced
from sglang_router import cli
from sglang_router.config.args import parse
from sglang_router.config.flags import OptionParser
from sglang_router.engine import options as engine
from sglang_router.errors import ConfigError
from sglang_router.launch import options as serve
from sglang_router.observe.catalogue import METRICS
from sglang_router.replay.options import parse_options

SHELL_BLOCKS = [block for document in DOCUMENTS for block in blocks(document) if block.language in SHELLS]
MODULES = {"launch_router": "launch", "launch_server": "serve", "engine": "engine"}
"""What `python -m sglang_router.NAME` is as a subcommand; any other module only has to exist."""
OPERATORS = (
    *("cli.md", "discovery.md", "kv-events.md", "limits.md", "models.md", "monitoring.md", "overload.md", "page.md"),
    *("quickstart.md", "replay.md", "restart.md", "security.md", "sessions.md", "troubleshooting.md", "tuning.md"),
)
"""Pages whose flags are ours, but for `OTHERS`."""
OTHERS = {
    *("--enable-cache-report", "--enable-prompt-tokens-details", "--kv-events-config", "--max-num-seqs", "--parallel"),
    *("--errors", "--headers", "--version"),
}
"""Flags of engines, of modules that print pages, and of `sglang-router` itself."""
METRIC_SUFFIX = re.compile(r"_(?:bucket|sum|count)$")
FILES = ("--config", "--router-config")
"""Flags whose file is read with the command line: the examples' files are not there."""


def _without_files(words: list[str]) -> list[str]:
    found = list(words)
    for flag in FILES:
        if flag in found:
            at = found.index(flag)
            del found[at : at + 2]
    return found


@functools.cache
def parsers() -> Mapping[str, argparse.ArgumentParser]:
    """Return the parsers of all commands, by name."""
    return cli.parsers()


def _parse(name: str, words: list[str]) -> None:
    """Read the words of a command as it does. Raises: ConfigError, SystemExit."""
    if name in READERS:
        READERS[name](words)
        return
    parser = parsers()[name]
    assert isinstance(parser, OptionParser)
    parser.parse_all(words)


READERS: dict[str, Callable[[list[str]], object]] = {
    "launch": lambda words: parse(words, {}),
    "serve": lambda words: serve.parse(words, {}),
    "server": lambda words: serve.parse(words, {}),
    "engine": engine.parse_options,
    "replay": parse_options,
}
"""Commands whose options are read by more than their parser."""


def wrong_with(words: list[str]) -> str:
    """Return what is wrong with a command of ours; "" for nothing, and for the commands of others."""
    match words:
        case ["sh", script, *_] if script.startswith("scripts/"):
            return "" if (ROOT / script).is_file() else f"there is no {script}"
        case ["sglang-router", name, *rest] if name.startswith("-"):
            return _wrong_flags("launch", [name, *rest])
        case ["sglang-router", name, *rest]:
            known = name in READERS or name in parsers()
            return _wrong_flags(name, rest) if known else f"there is no command {name}"
        case ["python", "-m", module, *rest] if module.startswith("sglang_router"):
            command = MODULES.get(module.removeprefix("sglang_router."))
            if command is None:
                return "" if importlib.util.find_spec(module) else f"there is no module {module}"
            return _wrong_flags(command, rest)
        case _:
            return ""


def _wrong_flags(name: str, words: list[str]) -> str:
    """`...` in an example stands for further options."""
    try:
        _parse(name, _without_files([word for word in words if word not in ("...", "--check-config")]))
    except ConfigError as error:
        return str(error)
    except SystemExit as ended:  # --help
        return "" if ended.code in (0, None) else f"exit status {ended.code}"
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_stands_in_fences_with_a_language(document: Path) -> None:
    """Else nobody could tell commands from other text."""
    lines = unfenced(document)
    assert lines == [], f"write ```sh, ```console, ```text ... around the indented code at lines {lines}"
    assert [block.where for block in blocks(document) if not block.language] == []


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.where)
def test_a_command_says_how_it_is_proved(block: Block) -> None:
    """See `documented`: `sh run="always"`, `sh run="by-hand"`, or `sh no-test="why not"`."""
    marks = {name: value for name, value in block.marks.items() if name in ("run", "no-test")}
    assert len(marks) == 1, f'add run="always", run="by-hand" or no-test="why not" to the fence at {block.where}'
    assert block.run in (ALWAYS, BY_HAND) or len(marks.get("no-test", "")) > 5


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.where)
def test_a_command_names_what_exists(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    found = {" ".join(words): wrong_with(words) for words in commands(block)}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_metric_that_is_named_exists(document: Path) -> None:
    """A name may be the beginning of several, as in `grep sgl_router_cache`."""
    text = document.read_text("utf-8")
    named = {METRIC_SUFFIX.sub("", name) for name in re.findall(r"\b(?:sgl_router|smg)_[a-z0-9_]+[a-z0-9]\b", text)}
    assert [name for name in sorted(named) if not any(metric.name.startswith(name) for metric in METRICS)] == []


@pytest.mark.parametrize("page", OPERATORS)
def test_a_flag_that_is_named_exists(page: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", (ROOT / "docs" / page).read_text("utf-8")))
    known = {flag for parser in parsers().values() for action in parser._actions for flag in action.option_strings}
    assert sorted(named - known - OTHERS) == []


@pytest.mark.parametrize("page", OPERATORS)
def test_a_path_that_is_named_exists(page: str) -> None:
    """docs/endpoints.md is made from the tables of endpoints; `/kv_event_sources` is vLLM's."""
    endpoints = (ROOT / "docs" / "endpoints.md").read_text("utf-8")
    named = set(re.findall(r"`(/[a-z_/{}]+)`", (ROOT / "docs" / page).read_text("utf-8"))) - {"/kv_event_sources"}
    assert [path for path in sorted(named) if path not in endpoints and not path.startswith("/etc/")] == []


def test_what_does_not_exist_is_found() -> None:
    assert "no scripts/nothing" in wrong_with(["sh", "scripts/nothing"])
    assert "no command lunch" in wrong_with(["sglang-router", "lunch"])
    assert "--polcy" in wrong_with(["sglang-router", "launch", "--polcy", "random"])
    assert "--polcy" in wrong_with(["python", "-m", "sglang_router.launch_router", "--polcy", "random"])
    assert "--router-polcy" in wrong_with(["sglang-router", "serve", "--router-polcy", "random"])
    assert "best" in wrong_with(["sglang-router", "replay", "gen:sessions", "--policies", "best"])
    assert "no module" in wrong_with(["python", "-m", "sglang_router.nothing"])
    assert wrong_with(["sglang-router", "status", "--helo"])
    assert wrong_with(["sglang-router", "launch", "...", "--policy", "cost", "--config", "none.yaml"]) == ""


def test_a_block_is_read_as_a_reader_does(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '# Page\n\n```console run="always"\n$ A=1 first one \\\n  > two\nshown\n$ second | third\n```\n\n'
        "- item\n\n    still the item\n\ntext\n\n    code\n"
    )
    [block] = blocks(page)
    assert (block.line, block.language, block.run) == (3, "console", "always")
    assert list(commands(block)) == [["first", "one"], ["second"], ["third"]]
    assert unfenced(page) == [16]


def test_a_text_is_alike_but_for_numbers_and_spaces() -> None:
    shown = ["worker  load", "a:8001    12", "..."]
    assert alike(shown, ["worker load", "a:31234 3,000.5", "more", "and more"])
    assert alike(shown, ["worker load", "", "a:31234 3"])
    assert not alike(shown, ["worker load"])
    assert not alike(shown, ["worker lead", "a:1 2"])
    assert not alike(["x"], ["x", "y"])


def test_the_figures_of_the_comparison_stand_where_they_were_measured() -> None:
    """It repeats them, so that a new measurement must not leave it behind."""
    measured = "".join(
        (ROOT / "docs" / f"{page}.md").read_text("utf-8")
        for page in ("performance", "routing", "reliability", "kubernetes")
    )
    rows = re.findall(r"^\|.*$", (ROOT / "docs" / "comparison.md").read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"`[^`]*`|\b(?:0\.3\.2|1\.13|0\.1\.17)\b", "", row) for row in rows)
    figures = {figure for row in plain for figure in re.findall(r"\d[\d,]*\.\d+|\d+,\d{3}", row)}
    assert len(figures) > 40
    assert [figure for figure in sorted(figures) if figure not in measured] == []
