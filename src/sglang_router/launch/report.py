"""What the launcher shows of the replicas: their output, the progress of the start, and why replicas failed.

    Supervisor --line-----> LogEcho   "[rank 0] ..." to standard error, or
                            LogFiles  rank-0.log, rank-1.log, ... in --log-dir
               --changed--> ReplicaReport: a record for each change of state; in addition, while the replicas start

        on a terminal         a row for each replica, redrawn in place; engine lines are not echoed meanwhile
            rank 0  healthy   18 s
            rank 1  loading   21 s  Loading safetensors checkpoint shards:  25% Completed
        elsewhere             every ten seconds, a record for each replica that is not ready yet

The start is over when every replica is healthy or has failed. No code here blocks on a terminal or a disk: records and
lines go through `observe.writer`, rows through `screen`.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from sglang_router.errors import ConfigError
from sglang_router.launch.replica import EngineCommand, EngineReplica, ReplicaState
from sglang_router.launch.screen import Screen
from sglang_router.observe.line_parts import Stamp, escaped
from sglang_router.observe.log_files import PathFile
from sglang_router.observe.logs import LogWriter
from sglang_router.observe.writer import CLOSE_TIMEOUT, LineBuffer
from sglang_router.words import are, counted

_LOGGER = "sglang_router.replicas"
_REDRAW = 0.2  # seconds
_REMIND = 10.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SECRET = re.compile(r"[-_](key|token|secret|password)\b", re.IGNORECASE)

_ENDED = frozenset({ReplicaState.RESTARTING, ReplicaState.FAILED})
_SETTLED = frozenset({ReplicaState.HEALTHY, ReplicaState.RESTARTING, ReplicaState.FAILED, ReplicaState.STOPPED})
_ADVICE: tuple[tuple[str, str], ...] = (
    ("unrecognized arguments", "the engine does not know a flag: correct it, or see the engine's own --help"),
    ("out of memory", "not enough memory: let the engine use less, or give each replica more GPUs (--tp-size)"),
    ("address already in use", "the port is in use: choose another --router-dp-worker-base-port"),
    ("another program listens on", "stop that program, or choose another --router-dp-worker-base-port"),
    ("no module named", "a package is missing in the engine's environment: install it, or set --engine-python"),
)
"""Advice by a text in a failed replica's reason or last lines; the first match counts."""


class EngineLines(Protocol):
    """Where the engines' output goes."""

    def line(self, rank: int, text: str) -> None: ...
    def close(self) -> None: ...


class CancellableTimer(Protocol):
    """A scheduled call, as an event loop returns it."""

    def cancel(self) -> None: ...


class LogEcho:
    """Writes lines to the router's own log, with the rank in front; as records if the log is JSON."""

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
        """Do nothing: the writer belongs to the router."""


class LogFiles:
    """Appends lines to a file for each rank in a folder.

    Raises: ConfigError if it cannot write files in that folder.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._buffers: dict[int, LineBuffer] = {}
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--log-dir {folder}: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"--log-dir {folder}: no permission to write there")

    def line(self, rank: int, text: str) -> None:
        buffer = self._buffers.get(rank)
        if buffer is None:
            buffer = self._buffers[rank] = LineBuffer(PathFile(self.path(rank)), _missing)
        buffer.put(text + "\n")

    def path(self, rank: int) -> str:
        return os.path.join(self._folder, f"rank-{rank}.log")

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close(CLOSE_TIMEOUT)


def _missing(lines: int) -> str:
    return f"[{counted(lines, 'line')} missing here: could not be written]\n"


class ReportOutputs(NamedTuple):
    """Where a report writes to.

    writer  the router's log
    lines   the engines' output
    screen  rows on a terminal; None if standard error is not a terminal
    """

    writer: LogWriter
    lines: EngineLines
    screen: Screen | None


class ReplicaReport:
    """The launcher's ReplicaReporter (see `replica`).

    later           the event loop's call_later
    clock           the supervisor's clock, in seconds
    size            number of replicas that are started at once
    url             URL of the router
    manual_command  rank -> the command to start this replica by hand
    """

    def __init__(
        self,
        *,
        later: Callable[[float, Callable[[], None]], CancellableTimer],
        clock: Callable[[], float],
        outputs: ReportOutputs,
        size: int,
        url: str,
        manual_command: Callable[[int], str],
    ) -> None:
        self._later = later
        self._clock = clock
        self._writer, self._lines, self._screen = outputs
        self._size = size
        self._url = url
        self._manual_command = manual_command
        self._began = clock()
        self._stamp = Stamp()
        self._replicas: dict[int, EngineReplica] = {}
        self._startup_secs: dict[int, float] = {}  # by rank, of the healthy replicas
        self._failed: set[int] = set()  # ranks reported as left down
        self._explained: set[int] = set()  # ranks whose current failure was explained
        self._starting = size > 0
        self._timer: CancellableTimer | None = None
        if self._starting:
            self._tick()

    # -- called by the supervisor ------------------------------------------------------------------------------------

    def line(self, replica: EngineReplica, text: str) -> None:
        if self._screen is None or isinstance(self._lines, LogFiles):
            self._lines.line(replica.rank, text)

    def changed(self, replica: EngineReplica) -> None:
        first = not self._startup_secs
        was_healthy = self._startup_secs.pop(replica.rank, None) is not None
        self._replicas[replica.rank] = replica
        if replica.state is ReplicaState.HEALTHY:
            self._startup_secs[replica.rank] = self._clock() - replica.started_at
        self._log_change(replica)
        if replica.state is ReplicaState.STARTING:
            self._explained.discard(replica.rank)
        elif replica.state in _ENDED and not (was_healthy or replica.pid or replica.rank in self._explained):
            self._explained.add(replica.rank)
            self._explain(replica)
        if self._starting and replica.state is ReplicaState.HEALTHY and first:
            self._record(logging.INFO, f"serving on {self._url}/v1", {})
        if self._starting and self._start_is_over(replica):
            self._end_start()

    def close(self) -> None:
        """Close the outputs. Call no other method after this."""
        self._stop_showing()
        self._lines.close()

    # -- changes ---------------------------------------------------------------------------------------------------

    def _log_change(self, replica: EngineReplica) -> None:
        """Log a change of state. Skip changes that the rows show, and the end of a replica that has failed."""
        level, message = _MESSAGES[replica.state]
        if replica.state is ReplicaState.FAILED:
            self._failed.add(replica.rank)
        elif replica.rank in self._failed:
            if replica.state in (ReplicaState.STOPPING, ReplicaState.STOPPED):
                return
            self._failed.discard(replica.rank)
        if replica.pid and level == logging.WARNING:  # its process still runs, so the restart was requested
            level = logging.INFO
        if self._screen is not None and level < logging.WARNING:
            return
        fields: dict[str, object] = {"rank": replica.rank}
        if replica.state is ReplicaState.HEALTHY:
            fields["seconds"] = round(self._startup_secs[replica.rank], 1)
        if replica.reason and replica.state in _ENDED:
            fields["reason"] = replica.reason
        if replica.restarts:
            fields["restarts"] = replica.restarts
        self._record(level, message, fields)

    def _explain(self, replica: EngineReplica) -> None:
        """Log the last lines of a replica that ended before it was healthy, and what to do."""
        tail = [_COLOUR.sub("", text) for text in replica.tail]
        fields = {"rank": replica.rank, "reason": replica.reason}
        message = "its last lines" if tail else "it printed nothing"
        self._record(logging.ERROR, f"a replica did not become healthy; {message}", fields, "\n".join(tail))
        said = "\n".join((replica.reason, *tail)).lower()
        advice = next((advice + "; " for sign, advice in _ADVICE if sign in said), "")
        manual = f"{advice}to try it by hand: {self._manual_command(replica.rank)}"
        self._record(logging.ERROR, manual, {"rank": replica.rank})

    def _record(self, level: int, message: str, fields: Mapping[str, object], lines: str = "") -> None:
        if level >= self._writer.level:
            stamp = self._stamp(time.time())
            line = self._writer.line(stamp, level, _LOGGER, message, fields, lines)
            self._writer.write(line, level >= logging.WARNING)

    # -- the start -------------------------------------------------------------------------------------------------

    def _start_is_over(self, changed: EngineReplica) -> bool:
        replicas = self._replicas.values()
        complete = len(replicas) >= self._size and all(replica.state in _SETTLED for replica in replicas)
        return complete or changed.state is ReplicaState.STOPPING

    def _end_start(self) -> None:
        self._stop_showing()
        healthy, seconds = len(self._startup_secs), round(self._clock() - self._began, 1)
        if healthy:
            level = logging.INFO if healthy == len(self._replicas) else logging.WARNING
            total = len(self._replicas)
            message = f"{healthy} of {counted(total, 'replica')} {are(total)} healthy"
            self._record(level, message, {"seconds": seconds, "url": f"{self._url}/v1"})
        elif all(replica.state is ReplicaState.FAILED for replica in self._replicas.values()):
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

    def _row(self, replica: EngineReplica) -> str:
        settled = replica.state in _SETTLED
        seconds = self._startup_secs.get(replica.rank, self._clock() - replica.started_at)
        last = replica.reason if settled else escaped(_COLOUR.sub("", replica.last_line))
        return f"rank {replica.rank}  {replica.state.value:<10}  {seconds:4.0f} s  {last}".rstrip()


_MESSAGES: dict[ReplicaState, tuple[int, str]] = {
    ReplicaState.STARTING: (logging.INFO, "a replica is starting"),
    ReplicaState.LOADING: (logging.INFO, "a replica is loading"),
    ReplicaState.HEALTHY: (logging.INFO, "a replica is healthy"),
    ReplicaState.RESTARTING: (logging.WARNING, "a replica will be restarted"),
    ReplicaState.STOPPING: (logging.INFO, "a replica is stopping"),
    ReplicaState.STOPPED: (logging.INFO, "a replica has stopped"),
    ReplicaState.FAILED: (logging.ERROR, "a replica is left down"),
}


def manual_command(command: EngineCommand) -> str:
    """Return a command as a user would type it, without the secrets in its flags."""
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
