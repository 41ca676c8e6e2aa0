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
from sglang_router.replay.options import parse_options

SHELL_BLOCKS = [block for document in DOCUMENTS for block in blocks(document) if block.language in SHELLS]
MODULES = {"launch_router": "launch", "launch_server": "serve", "engine": "engine"}
"""What `python -m sglang_router.NAME` is as a subcommand; any other module only has to exist."""
OTHER_PACKAGE = re.compile(r"sglang[-_]router(?!.*\.whl$)")
"""What installs from PyPI, where the package of our name is the Rust router; a wheel's file is ours."""
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
        case [pip, "install", *what] if pip.endswith("pip"):
            strange = [each for each in what if OTHER_PACKAGE.match(each)]
            return f"on PyPI, {strange[0]} is another program" if strange else ""
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


def test_what_does_not_exist_is_found() -> None:
    assert "no scripts/nothing" in wrong_with(["sh", "scripts/nothing"])
    assert "no command lunch" in wrong_with(["sglang-router", "lunch"])
    assert "--polcy" in wrong_with(["sglang-router", "launch", "--polcy", "random"])
    assert "--polcy" in wrong_with(["python", "-m", "sglang_router.launch_router", "--polcy", "random"])
    assert "--router-polcy" in wrong_with(["sglang-router", "serve", "--router-polcy", "random"])
    assert "best" in wrong_with(["sglang-router", "replay", "gen:sessions", "--policies", "best"])
    assert "no module" in wrong_with(["python", "-m", "sglang_router.nothing"])
    assert "another program" in wrong_with(["/opt/router/bin/pip", "install", "-U", "sglang-router[otel]"])
    assert wrong_with(["pip", "install", "sglang_router-*.whl"]) == wrong_with(["pip", "install", ".[otel]"]) == ""
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
