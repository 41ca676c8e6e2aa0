"""The completion in real shells: what a person gets who types so far and presses the tabulator."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sglang_router import cli
from sglang_router.commands import completion

WITHIN = 60.0
LINES = """
source "$1"
while IFS= read -r COMP_LINE; do
    IFS=' ' read -ra COMP_WORDS <<<"$COMP_LINE"
    [[ $COMP_LINE = *' ' ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_POINT=${#COMP_LINE}; COMPREPLY=()
    _shtab_sglang_router sglang-router "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[*]}"
done
"""
"""Prints for each line what bash would offer at its end: it calls the function that `complete -F` names."""


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The completion for a shell."""
    assert completion.main([request.param], "sglang-router completion", cli.parsers()) == 0
    path = tmp_path / "_sglang-router"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_what_bash_offers(script: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    mine = f"{tmp_path}/mi"
    offered = {
        "dr": "drain",
        "drain --w": "--wait",
        "launch --polic": "--policy",
        "launch --policy c": "cache_aware cost consistent_hashing",
        "serve --router-policy co": "cost consistent_hashing",
        "add --role ": "regular prefill decode",
        f"launch --config {mine}": f"{tmp_path}/mine.yaml",
        f"check-config {mine}": f"{tmp_path}/mine.yaml",
        "completion ": "bash zsh",
    }
    typed = "".join(f"sglang-router {line}\n" for line in offered)
    words = ["bash", "-c", LINES, "bash", str(script)]
    done = subprocess.run(words, input=typed, capture_output=True, text=True, timeout=WITHIN, check=False)
    said = [set(line.split()) for line in done.stdout.splitlines()]
    assert (done.stderr, said) == ("", [set(each.split()) for each in offered.values()])


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_zsh_gets_the_same(script: Path) -> None:
    said = script.read_text()
    for word in ("check-config", "--worker-urls", "--bootstrap-port", "drain", "--help-all", "consistent_hashing"):
        assert word in said


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_what_zsh_completes(script: Path) -> None:
    folder = script.parent
    (folder / ".zshrc").write_text(
        f"PS1='rea''dy> '\nfpath=({folder} $fpath)\nautoload -Uz compinit; compinit -u -D\nsglang-router() {{ : }}\n"
    )
    for typed, whole in (("dr", b"drain"), ("launch --polic", b"--policy"), ("launch --policy cos", b"cost")):
        child, terminal = pty.fork()
        if not child:
            os.execvpe("zsh", ["zsh", "-i"], os.environ | {"ZDOTDIR": str(folder), "TERM": "xterm"})
        try:
            _read_until(terminal, b"ready> ")
            os.write(terminal, f"sglang-router {typed}\t".encode())
            _read_until(terminal, whole)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
            os.close(terminal)


def _read_until(terminal: int, text: bytes) -> None:
    """Read what is on a terminal until it shows a text."""
    said, deadline = b"", time.monotonic() + WITHIN
    while text not in said:
        readable, _, _ = select.select([terminal], [], [], max(deadline - time.monotonic(), 0.0))
        assert readable, said
        said += os.read(terminal, 65536)
