"""The manual page, the help texts and the completion say what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_router import cli
from sglang_router.commands import manual, operating
from sglang_router.config import OPTIONS
from sglang_router.config.flags import COMMON, COMMON_OF, new_parser

PAGE = Path(__file__).parents[2] / "docs" / "sglang-router.1"


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text("utf-8") == manual.page()


def test_every_command_is_described_once() -> None:
    described = {name.split()[0] for name in manual.COMMANDS}
    served = {name for name in cli._COMMANDS if not name.startswith("-")} - {"server"}  # another name of `serve`
    assert described == served == cli.parsers().keys()
    assert set(manual.OPERATING) == operating.COMMANDS.keys()


def test_the_page_has_every_option() -> None:
    for option in OPTIONS.values():
        assert (option.flag.replace("-", "\\-") in manual.page()) == (option.status == "implemented")


@pytest.mark.parametrize("command", ["launch", "epp"])
def test_help_is_short_and_help_all_is_not(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = {*COMMON, *COMMON_OF.get(command, ())}
    assert common <= OPTIONS.keys()
    texts = []
    for flag in ("--help", "-h", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            new_parser(f"sglang-router {command}").parse_all([flag])
        assert ended.value.code == 0
        texts.append(capsys.readouterr().out)
    short, same, long = texts
    assert short == same
    assert "--cache-threshold" not in short
    assert "--help-all shows" in short
    for option in OPTIONS.values():
        assert option.flag in long
        assert (f"  {option.flag} " in short or f"  {option.flag}\n" in short) == (option.name in common)
