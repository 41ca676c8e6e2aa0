"""Files that are loaded again when they change: certificates, keys.

    WatchedFiles(paths, load, topic)  --refresh() every few seconds, or at SIGHUP-->  load() again, if they changed

A change never touches what is in use before the new content has been read and checked: `load` raises a ConfigError for
content that cannot be used, as in the middle of a renewal, and what was loaded before stays in use.

The first half of a list is a list too. So files whose mistakes cannot be told by their content are loaded when they
have `settled`: the last change is a second old, or they look as they did at the call before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from sglang_router.config import small_files
from sglang_router.errors import ConfigError

Mark = tuple[int, ...]
_CHANGED: Final = 3
"""Where a mark has the time of the last change, in nanoseconds."""
_SETTLED: Final = 1.0
"""Seconds since then from which on nobody is writing any more."""


class Renewed(Protocol):
    """What is loaded again when it changes: files, and the keys of an issuer (`app.issuer`)."""

    def refresh(self, *, anyway: bool = False) -> bool:
        """Load it again if it changed, or `anyway`; returns whether something new is in use now."""


class WatchedFiles:
    """See the module. Making it loads the files.

    load   reads the files, and puts what it found to use only when all of it is right
    topic  begins each log line
    wall   returns seconds since 1970: a change is loaded when it has settled; None: at once

    `complaint` is the last warning: why the files cannot be used now; "" while they can.

    Raises: ConfigError
    """

    def __init__(
        self,
        paths: Sequence[str],
        load: Callable[[], None],
        topic: str,
        log: logging.Logger,
        wall: Callable[[], float] | None = None,
    ) -> None:
        self._paths = paths
        self._load = load
        self._topic = topic
        self._log = log
        self._wall = wall
        self.complaint = ""
        self._marks = self._last = self._look()  # of the files in use, and of the last look
        load()

    def refresh(self, *, anyway: bool = False) -> bool:
        """Load the files again if they changed, or `anyway`; returns whether new ones are in use now.

        Without files, `anyway` loads what the options say.

        Files that cannot be used are one warning, and are tried again at each call.
        """
        marks = self._look()
        if not anyway and (not marks or marks == self._marks):
            self.complaint, self._last = "", marks
            return False
        before, self._last = self._last, marks
        if not anyway and marks != before and not self._settled(marks):
            return False
        try:
            self._refuse_pipes()
            self._load()
        except ConfigError as error:
            if str(error) != self.complaint:
                self.complaint = str(error)
                self._log.warning("%s: %s; the files loaded before stay in use", self._topic, error)
            return False
        self._marks, self.complaint = marks, ""
        if self._paths:
            self._log.info("%s: loaded %s anew", self._topic, ", ".join(self._paths))
        return bool(self._paths)

    def _refuse_pipes(self) -> None:
        for path in filter(small_files.is_pipe, self._paths):
            raise ConfigError(f"{path} is a pipe, which cannot be read again")

    def _settled(self, marks: tuple[Mark, ...]) -> bool:
        """Return whether the last change is old enough. A clock that is ahead makes it look young."""
        if self._wall is None:
            return True
        youngest = max((mark[_CHANGED] for mark in marks if mark), default=0)
        return self._wall() - youngest / 1e9 >= _SETTLED

    def _look(self) -> tuple[Mark, ...]:
        return tuple(map(_mark, self._paths))


def _mark(path: str) -> Mark:
    """Return what changes when a file changes, also behind symbolic links (Kubernetes swaps those); empty without a
    file."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
