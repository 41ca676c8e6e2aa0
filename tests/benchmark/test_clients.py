"""The native programs are built with $CC, which may have arguments."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from scripts.benchmark.clients import NAMES, Natives
from scripts.benchmark.processes import BenchError


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("compiler", ["", "env cc"])
def test_the_compiler_may_have_arguments(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    natives = Natives(tmp_path).build()
    assert all((natives.folder / name).exists() for name in NAMES)


def test_without_a_compiler_it_is_told_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(BenchError, match=r"a C compiler is needed.*apt-get install gcc"):
        Natives(tmp_path).build()
