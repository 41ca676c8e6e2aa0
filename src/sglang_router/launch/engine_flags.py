"""The engine's own flags, as far as the launcher must understand them: how many GPUs a replica takes, and whether the
user has set what would otherwise get a default. They are read only; the engine gets them as they came.

    flags = EngineFlags(["--tp-size", "2", "--pp_size=2", "--enable-metrics"])
    flags.number(TENSOR_PARALLEL) -> 2        flags.given("--enable-metrics") -> True
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

TENSOR_PARALLEL = ("--tp-size", "--tensor-parallel-size", "--tp", "-tp")
PIPELINE_PARALLEL = ("--pp-size", "--pipeline-parallel-size", "--pp", "-pp")


class EngineFlags:
    """Words of a command line; `_` in the name of a flag is as good as `-`, as for vLLM."""

    def __init__(self, words: Sequence[str]) -> None:
        self._last: dict[str, str] = {}  # the value of each flag's last use, "" for one without
        for word, following in zip_longest(words, words[1:], fillvalue=""):
            name, equals, value = word.partition("=")
            if name.startswith("-"):
                self._last[name.replace("_", "-")] = value if equals else following

    def given(self, *names: str) -> bool:
        """Whether one of these is there."""
        return any(name in self._last for name in names)

    def text(self, *names: str) -> str:
        """The value of the one of these flags that is there; "" if none is."""
        return next((self._last[name] for name in names if name in self._last), "")

    def number(self, names: Sequence[str], default: int = 1) -> int:
        """The same as a number. What is no number is the engine's to refuse, and counts as the default here."""
        text = self.text(*names)
        return int(text) if text.isdecimal() else default

    @property
    def gpus(self) -> int:
        """GPUs that one replica takes."""
        return max(1, self.number(TENSOR_PARALLEL) * self.number(PIPELINE_PARALLEL))
