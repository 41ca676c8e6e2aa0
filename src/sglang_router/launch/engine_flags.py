"""Read those of the engine's own flags that the launcher needs: how many GPUs a replica uses, and whether the user has
set a flag for which the launcher has a default. The engine gets its flags unchanged.

    flags = EngineFlags(["--tp-size", "2", "--pp_size=2", "--enable-metrics"])
    flags.number(TENSOR_PARALLEL) -> 2        flags.given("--enable-metrics") -> True
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

TENSOR_PARALLEL = ("--tp-size", "--tensor-parallel-size", "--tp", "-tp")
PIPELINE_PARALLEL = ("--pp-size", "--pipeline-parallel-size", "--pp", "-pp")


class EngineFlags:
    """The flags among the words of a command line. As in vLLM, `_` and `-` in the name of a flag are the same."""

    def __init__(self, words: Sequence[str]) -> None:
        self._last: dict[str, str] = {}  # the value of each flag's last use; "" for a flag without a value
        for word, following in zip_longest(words, words[1:], fillvalue=""):
            name, equals, value = word.partition("=")
            if name.startswith("-"):
                self._last[name.replace("_", "-")] = value if equals else following

    def given(self, *names: str) -> bool:
        """Whether one of these flags is given."""
        return any(name in self._last for name in names)

    def text(self, *names: str) -> str:
        """Return the value of the first of these flags that is given; "" if none is."""
        return next((self._last[name] for name in names if name in self._last), "")

    def number(self, names: Sequence[str], default: int = 1) -> int:
        """Return the same as a number. An invalid number counts as the default here; the engine will refuse it."""
        text = self.text(*names)
        return int(text) if text.isdecimal() else default

    @property
    def gpus(self) -> int:
        """GPUs that one replica uses."""
        return max(1, self.number(TENSOR_PARALLEL) * self.number(PIPELINE_PARALLEL))
