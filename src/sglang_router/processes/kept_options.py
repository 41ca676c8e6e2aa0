"""The options in effect, kept for processes that are started later: what a reload has changed outlives the decider.

    decider: a reload --keep--> anonymous memory, inherited by all <--last-- a decider or relay that is started again

Without it they would begin with the options of the router's start, and keep them if the file cannot be read again just
then: keys that a reload has taken away would be valid once more.

A record is written beside the one before, and then the place in front of both is changed, so that a decider that dies
in between leaves the one before. The memory is in no file system, for keys are among the options.
"""

from __future__ import annotations

import os
import pickle
from struct import Struct
from typing import Final

from sglang_router.config import RouterArgs

_PLACE: Final = Struct("=QQ")
"""Where the record begins, and its size; zeros: nothing is kept."""


class KeptOptions:
    """See the module. One for all processes of a router; only the decider writes."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("sglang-router-options")
        os.pwrite(self._fd, _PLACE.pack(0, 0), 0)

    def __repr__(self) -> str:
        return f"<KeptOptions {self._place()[1]} bytes>"

    def keep(self, args: RouterArgs) -> None:
        """Keep these options in place of those before."""
        record = pickle.dumps(args)
        begin, size = self._place()
        first = _PLACE.size
        at = first if begin == 0 or first + len(record) <= begin else begin + size
        os.pwrite(self._fd, record, at)
        os.pwrite(self._fd, _PLACE.pack(at, len(record)), 0)

    def last(self, otherwise: RouterArgs) -> RouterArgs:
        """Return the options that were kept last; `otherwise`, if none were."""
        begin, size = self._place()
        if not size:
            return otherwise
        args: RouterArgs = pickle.loads(os.pread(self._fd, size, begin))  # noqa: S301 - the decider wrote it
        return args

    def _place(self) -> tuple[int, int]:
        begin, size = _PLACE.unpack(os.pread(self._fd, _PLACE.size, 0))
        return begin, size

    def close(self) -> None:
        """Free the memory, as far as this process goes."""
        os.close(self._fd)
