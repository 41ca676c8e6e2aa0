"""Runs a command at each change of the number of workers there should be.

    SGLANG_ROUTER_DESIRED_WORKERS=3 SGLANG_ROUTER_CURRENT_WORKERS=2 SGLANG_ROUTER_SCALE_REASON="queue: ..." CMD

No shell is in between. One runs at a time; of the decisions made meanwhile the newest comes next. It is in a process
group of its own, which is killed when it takes over a minute and when the router ends. It is not run again when it
fails: only its author knows whether that would do any good.

Its standard error goes to a file without a name: a pipe would stay open for as long as anything that the command left
running holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import tempfile
from asyncio.subprocess import DEVNULL
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_router.core.scaling import Decision

log = logging.getLogger("sglang_router.scaling")

_TAIL = 4096
"""Bytes of standard error of which the last line is told."""


class Command:
    """See the module. `timeout` in seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, command: str, timeout: float = 60.0) -> None:
        self._loop = loop
        self._argv = shlex.split(command)
        self._timeout = timeout
        self._newest: Decision | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._runs = 0
        self._status: int | None = None
        self._error = ""

    def scale(self, decision: Decision) -> None:
        if not decision.changed or self._closed:
            return
        self._newest = decision
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._work())

    def explain(self) -> dict[str, Any]:
        return {
            "kind": "command",
            "to": self._argv[0],
            "running": self._task is not None and not self._task.done(),
            "runs": self._runs,
            "last_status": self._status,
            "last_error": self._error,
        }

    async def close(self) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        while (decision := self._newest) is not None and not self._closed:
            self._newest = None
            self._status, self._error = await self._run(decision)
            self._runs += 1
            if self._status == 0:
                log.info("scale command done, workers wanted: %d", decision.desired)
            else:
                log.warning("scale command failed, workers wanted: %d; %s", decision.desired, self._error)

    async def _run(self, decision: Decision) -> tuple[int | None, str]:
        """Runs it once: its exit status, or None if there was none; and what was wrong."""
        told = {
            "SGLANG_ROUTER_DESIRED_WORKERS": str(decision.desired),
            "SGLANG_ROUTER_CURRENT_WORKERS": str(decision.current),
            "SGLANG_ROUTER_SCALE_REASON": decision.reason,
        }
        try:
            with tempfile.TemporaryFile(buffering=0) as errors:
                status = await self._wait(errors, {**os.environ, **told})
                said = _last_line(errors)
        except OSError as exc:
            return None, f"cannot be run: {exc.strerror}"
        if status is None:
            return None, f"not done within {self._timeout:g} s, killed"
        return status, "" if status == 0 else f"status {status}{f', {said}' if said else ''}"

    async def _wait(self, errors: IO[bytes], environment: dict[str, str]) -> int | None:
        """Runs it; its exit status, or None when it took too long. Nothing is left of it when this is cancelled."""
        process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=DEVNULL, stdout=DEVNULL, stderr=errors, env=environment, start_new_session=True
        )
        try:
            return await asyncio.wait_for(process.wait(), self._timeout)
        except asyncio.TimeoutError:
            return None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


def _last_line(file: IO[bytes]) -> str:
    """The last line that is not empty."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
    lines = file.read(_TAIL).decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
