"""Runs a command at each change of the desired number of workers (--scale-command).

    SGLANG_ROUTER_DESIRED_WORKERS=3 SGLANG_ROUTER_CURRENT_WORKERS=2 SGLANG_ROUTER_SCALE_REASON="queue: ..." CMD

The command runs without a shell. One command runs at a time; then the newest of the decisions made meanwhile is next.
The command has its own process group, which is killed after a minute and when the router ends. A failed command is not
run again: only its author knows whether that would help. Of several routers only the one that leads runs it: what waits
is dropped by one that does not any more.

Standard error goes to an unnamed file: a pipe would stay open for as long as any process that the command left behind.
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
from collections.abc import Callable
from typing import IO, Any

from sglang_router.autoscale.scaler import Decision

log = logging.getLogger("sglang_router.scaling")

_TAIL = 4096
"""Bytes of standard error that are searched for the last line."""


class ScaleCommand:
    """See the module. `timeout` in seconds.

    acts  returns whether this router still acts for all: asked before each run
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        command: str,
        timeout: float = 60.0,
        acts: Callable[[], bool] = lambda: True,
    ) -> None:
        self._loop = loop
        self._argv = shlex.split(command)
        self._timeout = timeout
        self._acts = acts
        self._newest: Decision | None = None  # the decision to run next
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._runs = 0
        self._status: int | None = None
        self._error = ""

    def scale(self, decision: Decision) -> None:
        """Run the command for a changed decision; a newer one replaces one that waits."""
        if not decision.changed or self._closed:
            return
        self._newest = decision
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._work())

    def explain(self) -> dict[str, Any]:
        """Describe the state, for GET /scale."""
        return {
            "kind": "command",
            "to": self._argv[0],
            "running": self._task is not None and not self._task.done(),
            "runs": self._runs,
            "last_status": self._status,
            "last_error": self._error,
        }

    async def close(self) -> None:
        """Stop; end a running command."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        """Run the command until no decision is left."""
        while (decision := self._newest) is not None and not self._closed:
            self._newest = None
            if not self._acts():
                log.info("scale command is not run: another router acts now")
                return
            self._status, self._error = await self._run(decision)
            self._runs += 1
            if self._status == 0:
                log.info("scale command succeeded, desired workers: %d", decision.desired)
            else:
                log.warning("scale command failed, desired workers: %d; %s", decision.desired, self._error)

    async def _run(self, decision: Decision) -> tuple[int | None, str]:
        """Run the command once. Return its exit status (None if it has none) and the error, "" on success."""
        variables = {
            "SGLANG_ROUTER_DESIRED_WORKERS": str(decision.desired),
            "SGLANG_ROUTER_CURRENT_WORKERS": str(decision.current),
            "SGLANG_ROUTER_SCALE_REASON": decision.reason,
        }
        try:
            with tempfile.TemporaryFile(buffering=0) as errors:
                status = await self._wait(errors, {**os.environ, **variables})
                said = _last_line(errors)
        except OSError as exc:
            return None, f"cannot be run: {exc.strerror}"
        if status is None:
            return None, f"timed out after {self._timeout:g} s, killed"
        return status, "" if status == 0 else f"status {status}{f', {said}' if said else ''}"

    async def _wait(self, errors: IO[bytes], environment: dict[str, str]) -> int | None:
        """Run the command. Return its exit status, or None when it timed out. Kill its process group when cancelled."""
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
    """Return the last line that is not empty."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
    lines = file.read(_TAIL).decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
