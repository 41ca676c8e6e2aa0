"""The state file: what the router knows, kept on disk, and taken up again by the next one at its start.

    load()        at the start: workers, drained marks, prefixes; what cannot be believed is left, with one warning
    save()        every `interval`, when the router begins to stop, and before a successor takes over

    loop     | frame |    rest    | frame |    rest    | ...            `core.snapshot.frames`, a fraction of a ms each
    thread           '-- write --'        '-- write --'      fsync, rename

The router serves meanwhile: after each frame the loop has four times as long for others. A fork would stop it for
30 ms at 400 MB (the kernel copies page tables), and might double its memory.

The file appears whole or not at all (a temporary one, fsync, rename), and only its owner may read it (0600): it holds
the keys of workers that were added with one of their own, and the beginnings of prompts. One that others may write is
not believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

from sglang_router.core import snapshot
from sglang_router.core.snapshot import HEADER_SIZE, Defaults, Seal, Unreadable
from sglang_router.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from sglang_router.core.fleet import Fleet
    from sglang_router.core.snapshot import Saved, State
    from sglang_router.core.tree import Tree
    from sglang_router.core.worker import Worker

log = logging.getLogger("sglang_router.state")

_SHARE = 4.0
"""How many times as long as for a frame the loop is left to others."""
_REST = 0.001
_WRITE = 1 << 18
"""Bytes for a thread to write at once, or a frame's if that has more."""


class Clocks(NamedTuple):
    """`now` in seconds of the fleet's time, `today` since 1970."""

    now: Callable[[], float] = time.monotonic
    today: Callable[[], float] = time.time


class StateFile:
    """See the module.

    tree      the policy's, if it keeps one; empty at `load`
    defaults  what the options say of workers
    ours      which workers are to be kept: not those whose processes end with this one
    rests     whether this router must not write now, because another one does

    Raises: ConfigError when there can be no such file.
    """

    def __init__(
        self,
        path: str,
        fleet: Fleet,
        tree: Tree | None,
        defaults: Defaults,
        *,
        ours: Callable[[Worker], bool] = lambda _: True,
        rests: Callable[[], bool] = lambda: False,
        clocks: Clocks | None = None,
    ) -> None:
        self._path = os.path.abspath(path)
        self._fleet = fleet
        self._tree = tree
        self._defaults = defaults
        self._ours = ours
        self._rests = rests
        self._clocks = clocks or Clocks()
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._failing = False
        folder = os.path.dirname(self._path)
        if os.path.isdir(self._path) or not os.path.isdir(folder):
            raise ConfigError(f"--state-file {path}: it must name a file in a folder that exists")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"--state-file {path}: its folder cannot be written to")

    # -- in --------------------------------------------------------------------------------------------------------

    def load(self) -> int:
        """Registers the workers of the file and fills the tree; returns how many workers. Blocks, before the start."""
        try:
            data = _read(self._path)
            if data is None:
                return 0
            state = snapshot.read(data)
            workers = self._register(state)
            self._fill(state, workers)
        except Unreadable as exc:
            log.warning("the state file %s %s; what it may hold is not used", self._path, exc)
            return len(self._fleet)
        held = self._tree.held if self._tree is not None else 0
        log.info("restored %d workers and %d bytes of prefixes from %s", len(workers), held, self._path)
        return len(workers)

    def _register(self, state: State) -> list[tuple[Saved, Worker]]:
        workers = []
        for saved in state.head.workers:
            if saved.wanted(self._defaults):
                spec = saved.spec_now(self._defaults)
                worker = self._fleet.add(spec, self._clocks.now(), restored=saved.id)
                self._fleet.set_draining(worker, saved.draining)
                workers.append((saved, worker))
        return workers

    def _fill(self, state: State, workers: list[tuple[Saved, Worker]]) -> None:
        """Prefixes of workers whose first check will tell whether they are still there."""
        if self._tree is not None:
            slots = {
                saved.slot: worker.slot for saved, worker in workers if saved.slot >= 0 and worker.spec.health.enabled
            }
            state.fill(self._tree, slots, self._clocks.now(), self._clocks.today())

    # -- out -------------------------------------------------------------------------------------------------------

    def start(self, interval: float) -> None:
        """Saves every `interval` seconds from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run(interval))

    async def _run(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            if not self._rests():
                await self.save()

    async def save(self, *, hurry: bool = False) -> bool:
        """Writes the file; false, and a warning the first time, when that fails. `hurry`: with shorter rests."""
        async with self._turn:
            try:
                await self._write(hurry)
            except OSError as exc:
                if not self._failing:
                    log.warning("the state file %s cannot be written: %s", self._path, exc.strerror or exc)
                self._failing = True
                return False
            self._failing = False
            return True

    async def _write(self, hurry: bool) -> None:
        """Raises: OSError"""
        new = _NewFile(self._path)
        try:
            await _in_thread(new.create)
            workers = [worker for worker in self._fleet if self._ours(worker)]
            head = snapshot.head_of(workers, self._defaults, self._clocks.now(), self._clocks.today())
            frames = snapshot.frames(head, self._tree)
            more = True
            while more:
                made: list[bytes] = []
                while more and sum(map(len, made)) < _WRITE:
                    began = time.perf_counter()
                    frame = next(frames, None)
                    more = frame is not None
                    made += [frame] if frame is not None else []
                    took = time.perf_counter() - began
                    await asyncio.sleep(0 if hurry else max(_REST, took * _SHARE))
                await _in_thread(new.append, b"".join(made))
            await _in_thread(new.finish)
        finally:
            new.discard()

    async def close(self) -> None:
        """Saves no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


# -- the file --------------------------------------------------------------------------------------------------------


async def _in_thread(work: Callable[..., None], *arguments: object) -> None:
    """Lets a thread do what may block. It is waited for even if that is cancelled: nobody else may touch the file."""
    job = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise


class _NewFile:
    """The file that is to take the place of another one, under a name of its own until it is whole."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._name = f"{path}.{os.getpid()}.new"
        self._file: BinaryIO | None = None
        self._seal = Seal()

    def create(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name)  # of a process of the same number that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._name, flags, 0o600), "wb")
        self._file.write(bytes(HEADER_SIZE))

    def append(self, frames: bytes) -> None:
        assert self._file is not None
        self._seal.add(frames)
        self._file.write(frames)

    def finish(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.write(self._seal.header())
        self._file.flush()
        os.fsync(self._file.fileno())
        os.rename(self._name, self._path)
        folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Closes it; what has not become the file goes."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._name)


def _read(path: str) -> bytes | None:
    """The content of a file that only its owner can have written; None when there is none.

    Raises: Unreadable
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not hold us up
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise Unreadable("is not a plain file")
            if facts.st_mode & 0o022 or facts.st_uid not in (os.geteuid(), 0):
                raise Unreadable("can be written by others (it should be ours, with mode 0600)")
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise Unreadable(f"cannot be read: {exc.strerror or exc}") from None
