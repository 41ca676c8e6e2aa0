"""What people see of the replicas: their lines, how far the start is, and what became of those that failed.

    Supervisor --line-----> Echo   "[rank 0] ..." to standard error, or
                            Files  rank-0.log, rank-1.log, ... in --log-dir
               --changed--> Report: a record for each change of state; while the replicas start, beside that

        on a terminal         a row for each, redrawn in place; their lines are not echoed meanwhile
            rank 0  healthy   18 s
            rank 1  loading   21 s  Loading safetensors checkpoint shards:  25% Completed
        elsewhere             a record for each that is not ready yet, every ten seconds

The start is over when every replica is healthy or has failed. Nothing here waits for a terminal or a disk: records and
lines go through `observe.writer`, rows through `screen`.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from typing import TYPE_CHECKING, Protocol

from sglang_router.errors import ConfigError
from sglang_router.launch.replica import Command, Replica, State
from sglang_router.launch.screen import Screen
from sglang_router.observe.logs import LogWriter, Stamp, escaped
from sglang_router.observe.writer import PATIENCE, Drain, Fixed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LOGGER = "sglang_router.replicas"
_REDRAW = 0.2  # seconds
_REMIND = 10.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SECRET = re.compile(r"[-_](key|token|secret|password)\b", re.IGNORECASE)

_ENDED = frozenset({State.RESTARTING, State.FAILED})
_SETTLED = frozenset({State.HEALTHY, State.RESTARTING, State.FAILED, State.STOPPED})
_ADVICE: tuple[tuple[str, str], ...] = (
    ("unrecognized arguments", "the engine does not know a flag: correct it, or see the engine's own --help"),
    ("out of memory", "memory is short: give the engine less of it, or more GPUs to each replica (--tp-size)"),
    ("address already in use", "somebody else took its port: choose another --router-dp-worker-base-port"),
    ("no module named", "the engine's environment is not complete: install what it misses, or see --engine-python"),
)
"""What to do, by what a failed replica's last lines say; the first that fits."""


class EngineLines(Protocol):
    """Where the engines' own lines go."""

    def line(self, rank: int, text: str) -> None: ...
    def close(self) -> None: ...


class Timer(Protocol):
    """A call that is due later, as an event loop makes them."""

    def cancel(self) -> None: ...


class Echo:
    """To the router's own log, with the rank in front; as records where that is JSON."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._stamp = Stamp()

    def line(self, rank: int, text: str) -> None:
        text = _COLOUR.sub("", text)
        if self._writer.json:
            stamp = self._stamp(time.time())
            line = self._writer.line(stamp, logging.INFO, "engine", text, {"rank": rank}, "")
        else:
            line = f"[rank {rank}] {escaped(text)}\n"
        self._writer.write(line, False)

    def close(self) -> None:
        """The writer belongs to the router."""


class Files:
    """To a file for each rank in a folder, appended as they come.

    Raises: ConfigError when there can be no files in that folder.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._drains: dict[int, Drain] = {}
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--log-dir {folder}: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"--log-dir {folder}: no permission to write there")

    def line(self, rank: int, text: str) -> None:
        drain = self._drains.get(rank)
        if drain is None:
            drain = self._drains[rank] = Drain(_RankFile(self.path(rank)), _missing)
        drain.put(text + "\n")

    def path(self, rank: int) -> str:
        return os.path.join(self._folder, f"rank-{rank}.log")

    def close(self) -> None:
        for drain in self._drains.values():
            drain.close(PATIENCE)


class _RankFile(Fixed):
    """A file that is opened at the first line, and again when it was taken away."""

    def __init__(self, path: str) -> None:
        super().__init__(-1)
        self._path = path

    def fd(self) -> int:
        if self._fd < 0 or os.fstat(self._fd).st_nlink == 0:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            self.close()
            self._fd = fd
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _missing(lines: int) -> str:
    return f"[{lines} lines are missing here: they could not be written]\n"


class Report:
    """A Reporter (see `replica`).

    later     the event loop's call_later
    clock     the supervisor's, in seconds
    size      replicas that are started at once
    screen    where rows can be drawn; None elsewhere than on a terminal
    url       of the router
    by_hand   rank -> the command to start this replica by hand
    """

    def __init__(
        self,
        *,
        later: Callable[[float, Callable[[], None]], Timer],
        clock: Callable[[], float],
        writer: LogWriter,
        lines: EngineLines,
        screen: Screen | None,
        size: int,
        url: str,
        by_hand: Callable[[int], str],
    ) -> None:
        self._later = later
        self._clock = clock
        self._writer = writer
        self._lines = lines
        self._screen = screen
        self._size = size
        self._url = url
        self._by_hand = by_hand
        self._began = clock()
        self._stamp = Stamp()
        self._replicas: dict[int, Replica] = {}
        self._took: dict[int, float] = {}  # of those that are healthy: seconds until they were
        self._given_up: set[int] = set()
        self._explained: set[int] = set()  # of those whose present end was told of
        self._starting = size > 0
        self._timer: Timer | None = None
        if self._starting:
            self._tick()

    # -- what the supervisor tells ---------------------------------------------------------------------------------

    def line(self, replica: Replica, text: str) -> None:
        if self._screen is None or isinstance(self._lines, Files):
            self._lines.line(replica.rank, text)

    def changed(self, replica: Replica) -> None:
        first = not self._took
        was_healthy = self._took.pop(replica.rank, None) is not None
        self._replicas[replica.rank] = replica
        if replica.state is State.HEALTHY:
            self._took[replica.rank] = self._clock() - replica.started_at
        self._tell(replica)
        if replica.state is State.STARTING:
            self._explained.discard(replica.rank)
        elif replica.state in _ENDED and not (was_healthy or replica.pid or replica.rank in self._explained):
            self._explained.add(replica.rank)
            self._explain(replica)
        if self._starting and replica.state is State.HEALTHY and first:
            self._record(logging.INFO, f"serving on {self._url}/v1", {})
        if self._starting and self._over(replica):
            self._end_of_start()

    def close(self) -> None:
        """Ends it all; nothing may be told any more."""
        self._stop_showing()
        self._lines.close()

    # -- changes ---------------------------------------------------------------------------------------------------

    def _tell(self, replica: Replica) -> None:
        """One record for a change; those that the rows show are left out, and the end of what has failed."""
        level, message = _MESSAGES[replica.state]
        if replica.state is State.FAILED:
            self._given_up.add(replica.rank)
        elif replica.rank in self._given_up:
            if replica.state in (State.STOPPING, State.STOPPED):
                return
            self._given_up.discard(replica.rank)
        if replica.pid and level == logging.WARNING:  # it runs still, so this was asked for
            level = logging.INFO
        if self._screen is not None and level < logging.WARNING:
            return
        fields: dict[str, object] = {"rank": replica.rank}
        if replica.state is State.HEALTHY:
            fields["seconds"] = round(self._took[replica.rank], 1)
        if replica.reason and replica.state in _ENDED:
            fields["reason"] = replica.reason
        if replica.restarts:
            fields["restarts"] = replica.restarts
        self._record(level, message, fields)

    def _explain(self, replica: Replica) -> None:
        """It ended before it was healthy: what it said last, and what to do."""
        tail = [_COLOUR.sub("", text) for text in replica.tail]
        fields = {"rank": replica.rank, "reason": replica.reason}
        message = "its last lines" if tail else "it wrote nothing"
        self._record(logging.ERROR, f"a replica did not become healthy; {message}", fields, "\n".join(tail))
        said = "\n".join(tail).lower()
        advice = next((advice + "; " for sign, advice in _ADVICE if sign in said), "")
        hand = f"{advice}to try it by hand: {self._by_hand(replica.rank)}"
        self._record(logging.ERROR, hand, {"rank": replica.rank})

    def _record(self, level: int, message: str, fields: Mapping[str, object], lines: str = "") -> None:
        if level >= self._writer.level:
            stamp = self._stamp(time.time())
            line = self._writer.line(stamp, level, _LOGGER, message, fields, lines)
            self._writer.write(line, level >= logging.WARNING)

    # -- the start -------------------------------------------------------------------------------------------------

    def _over(self, changed: Replica) -> bool:
        replicas = self._replicas.values()
        whole = len(replicas) >= self._size and all(replica.state in _SETTLED for replica in replicas)
        return whole or changed.state is State.STOPPING

    def _end_of_start(self) -> None:
        self._stop_showing()
        healthy, seconds = len(self._took), round(self._clock() - self._began, 1)
        if healthy:
            level = logging.INFO if healthy == len(self._replicas) else logging.WARNING
            message = f"{healthy} of {len(self._replicas)} replicas are healthy"
            self._record(level, message, {"seconds": seconds, "url": f"{self._url}/v1"})
        elif all(replica.state is State.FAILED for replica in self._replicas.values()):
            self._record(logging.ERROR, "no replica could be started", {"seconds": seconds})

    def _stop_showing(self) -> None:
        self._starting = False
        if self._timer is not None:
            self._timer.cancel()
        if self._screen is not None:
            self._screen.close()
            self._screen = None

    def _tick(self) -> None:
        waiting = [replica for replica in self._replicas.values() if replica.state not in _SETTLED]
        if self._screen is not None:
            self._screen.show([self._row(replica) for _, replica in sorted(self._replicas.items())])
        else:
            for replica in waiting:
                seconds = round(self._clock() - replica.started_at)
                fields = {"rank": replica.rank, "seconds": seconds, "last": _COLOUR.sub("", replica.last_line)}
                self._record(logging.INFO, f"a replica is still {replica.state.value}", fields)
        self._timer = self._later(_REMIND if self._screen is None else _REDRAW, self._tick)

    def _row(self, replica: Replica) -> str:
        settled = replica.state in _SETTLED
        seconds = self._took.get(replica.rank, self._clock() - replica.started_at)
        last = replica.reason if settled else escaped(_COLOUR.sub("", replica.last_line))
        return f"rank {replica.rank}  {replica.state.value:<10}  {seconds:4.0f} s  {last}".rstrip()


_MESSAGES: dict[State, tuple[int, str]] = {
    State.STARTING: (logging.INFO, "a replica is starting"),
    State.LOADING: (logging.INFO, "a replica is loading"),
    State.HEALTHY: (logging.INFO, "a replica is healthy"),
    State.RESTARTING: (logging.WARNING, "a replica is to be started again"),
    State.STOPPING: (logging.INFO, "a replica is stopping"),
    State.STOPPED: (logging.INFO, "a replica has stopped"),
    State.FAILED: (logging.ERROR, "a replica is left down"),
}


def by_hand(command: Command) -> str:
    """A command as one would type it, without the secrets in its flags."""
    shown: list[str] = []
    for word in command.argv:
        name, equals, _ = word.partition("=")
        if shown and shown[-1].startswith("-") and "=" not in shown[-1] and _SECRET.search(shown[-1]):
            shown.append("***")
        elif equals and name.startswith("-") and _SECRET.search(name):
            shown.append(f"{name}=***")
        else:
            shown.append(word)
    env = [f"{name}={value}" for name, value in command.env.items()]
    return shlex.join([*(("env", *env) if env else ()), *shown])
