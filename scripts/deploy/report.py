"""What was checked, and what could not be: lines as they come, and a summary.

with report.part("Helm chart"):
    report.ok("helm lint")              a check that held
    report.left("no kubelet here: ...") something that cannot be checked on this machine
    raise Failure("...")                a check that did not hold: the part ends, the others go on
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence


class Failure(Exception):
    """Something is not as it should be."""


class Missing(Exception):
    """A program that a part needs is not here; the text says how to get it."""


class Report:
    """See the module. failed: parts that did not hold."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._left: list[str] = []
        self._count = 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run one part; a failure ends it, and is told at the end again."""
        print(f"== {name}", flush=True)
        began = time.monotonic()
        try:
            yield
        except Failure as failure:
            self.failed.append(name)
            print(f"FAILED {failure}", flush=True)
        except Missing as missing:
            self.left(f"{name}: {missing}")
        print(f"   {time.monotonic() - began:.0f} s", flush=True)

    def ok(self, what: str) -> None:
        self._count += 1
        print(f"ok     {what}", flush=True)

    def left(self, what: str) -> None:
        self._left.append(what)
        print(f"left   {what}", flush=True)

    def close(self) -> int:
        """Print the summary; return the exit status."""
        print(f"\n{self._count} checks held, {len(self.failed)} parts failed{''.join(f': {n}' for n in self.failed)}")
        for what in self._left:
            print(f"not checked here: {what}")
        return 1 if self.failed else 0


def run(
    words: Sequence[object], *, text: str | None = None, variables: Mapping[str, str] | None = None, ok: bool = True
) -> str:
    """Run a command; return what it wrote to standard output. ok: it must end with status 0. Raises: Failure."""
    command = [str(word) for word in words]
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if ok and done.returncode:
        raise Failure(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
