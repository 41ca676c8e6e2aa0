"""What the page shows, assembled once a second for all who look, and only while somebody does.

    counters --> FleetReading --> Point: figures of the last seconds    every 10 s kept for half an hour (a job)
    fleet    --> WorkerRow --> rows that changed since the last frame  |
    witness  --> events                                                |--> a frame: JSON --> viewers
    records  --> the last decisions                                    |

A viewer's first frame is whole. Each further one has what changed since the one before; a viewer that is slow misses
some, and gets all that changed since its last one. A frame is encoded once for all viewers that have seen the same.
Assembling is done in slices of a millisecond of the event loop: docs/page.md has the cost for 1,000 workers.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import msgspec

from sglang_router.admin.decision_book import DecisionBook
from sglang_router.admin.figures import FleetReading, Point, Totals, between
from sglang_router.admin.shared import in_slices
from sglang_router.admin.witness import Event, Witness
from sglang_router.admin.worker_row import COLUMNS, WorkerRow, row_of
from sglang_router.autoscale.autoscaler import Autoscaler
from sglang_router.errors import RateLimited, ShuttingDown
from sglang_router.routing.decision_record import DecisionRecord
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.sharing.standing import SharedStanding
from sglang_router.version import __version__, build

MOST_VIEWERS = 32
_EVERY = 1.0
_WINDOW = 10.0
"""Seconds of which the figures are."""
_POINT_EVERY = 10.0
_POINTS = 180
"""Half an hour."""
_REMEMBERED = 180
"""Frames; a viewer that saw none of the last so many gets everything again."""
_STEPS = 4
"""Pieces of a reading in one turn of the event loop."""
_PAUSE = 0.01
_DECISIONS = 40
_SCALINGS = 20


class ShadowState(msgspec.Struct):
    """What the shadow policy would have done: decisions on which both agreed or not, and bytes matched by each."""

    policy: str
    agreed: int
    differed: int
    matched: int
    actual_matched: int


class DecisionSummary(msgspec.Struct):
    """A decision in short: see `DecisionRecord`, whose fields these are."""

    id: str
    at: float
    endpoint: str
    model: str
    session: str
    worker: str | None
    branch: str
    matched: int
    total: int
    retries: int
    outcome: str
    status: int
    code: str
    first_byte: float | None
    duration: float
    prompt_tokens: int | None
    cached_tokens: int | None


class Frame(msgspec.Struct):
    """What a viewer gets.

    frame      its number
    whole      it has everything, not only what changed
    now        figures of the last seconds
    columns    what the values of a row are
    rows       workers that changed; gone: ids of those that were removed
    points     one for each 10 s of the last half an hour, the oldest first: new ones
    decisions  the last ones, the newest first; null: as before
    recorded   decisions are kept
    events     new ones, the oldest first
    shadow     null without --shadow-policy
    scale      the answer of GET /scale; null without --autoscale
    shared     how the router shares its knowledge with others; null: it is alone
    rolling    the answer of GET /restart_workers; null where others run the engines
    """

    frame: int
    whole: bool
    at: float
    version: str
    build: str
    policy: str
    uptime: float
    now: Point
    columns: tuple[str, ...]
    rows: list[WorkerRow]
    gone: list[str]
    points: list[Point]
    decisions: list[DecisionSummary] | None
    recorded: bool
    events: list[Event]
    shadow: ShadowState | None
    scale: dict[str, Any] | None
    shared: SharedStanding | None
    rolling: dict[str, Any] | None


class Replicas(Protocol):
    """The engines that the router runs itself, as this module uses them."""

    def describe(self, worker: Worker) -> dict[str, Any] | None:
        """Describe a worker's process; None if somebody else runs it."""

    @property
    def rolling(self) -> dict[str, Any]:
        """The progress of the rolling restart."""


class Parts(Protocol):
    """What is read of `admin.context.Context`."""

    @property
    def fleet(self) -> Fleet:
        """All workers."""

    @property
    def clock(self) -> Callable[[], float]:
        """Gives seconds."""

    @property
    def replicas(self) -> Replicas | None:
        """Runs the engines; None: they run elsewhere."""

    @property
    def autoscaler(self) -> Autoscaler | None:
        """None: the number of workers is fixed."""

    @property
    def decisions(self) -> DecisionBook | None:
        """The last ones; None: they are not kept."""

    @property
    def ending(self) -> bool:
        """The router is about to stop."""


class Counters(msgspec.Struct, kw_only=True):
    """What is read of the metrics.

    totals   yields None where it may pause, and at last the counters
    bounds   of their histogram
    queued   and running: requests now
    shadow   what the shadow policy would have done; None: there is none
    shared   how knowledge is shared with other routers; None: it is not
    """

    totals: Callable[[], Iterator[Totals | None]]
    bounds: Sequence[float]
    queued: Callable[[], int]
    running: Callable[[], int]
    shadow: Callable[[], ShadowState | None]
    shared: Callable[[], SharedStanding | None]


class _Row(msgspec.Struct):
    """A worker's row, and the number of the frame since which it is so."""

    row: WorkerRow
    since: int


class Live:
    """See the module. policy: the name of the usual one, which a reload may change."""

    def __init__(self, parts: Parts, counters: Counters, policy: str, wall: Callable[[], float] = time.time) -> None:
        self.witness = Witness(wall)
        self.viewers = 0
        self._parts = parts
        self._counters = counters
        self.policy = policy
        self._wall = wall
        self._epoch = wall() - parts.clock()
        self._begun = parts.clock()
        # for half an hour
        self._points: deque[tuple[int, Point]] = deque(maxlen=_POINTS)  # with the number of the frame that has it
        self._readings: deque[FleetReading] = deque()
        self._kept: FleetReading | None = None  # of the last point
        self._reading: Iterator[Totals | None] | None = None  # the job's, when it is in the middle of one
        # while somebody looks
        self._task: asyncio.Task[None] | None = None
        self._next = asyncio.Event()
        self._number = 0
        self._made_at = -_EVERY
        self._rows: dict[str, _Row] = {}
        self._gone: dict[str, int] = {}  # removed workers, and the frame that says so
        self._decisions: list[DecisionRecord] = []
        self._decided = 0  # the number of the frame in which they changed
        self._heard: dict[int, int] = {}  # events until a frame
        self._encoded: dict[int, bytes] = {}  # the last frame, by the one that a viewer saw before it
        self._encoding = asyncio.Lock()
        self._now: Point | None = None

    def __repr__(self) -> str:
        return f"<Live frame {self._number}, {self.viewers} viewers>"

    # -- for half an hour ----------------------------------------------------------------------------------------------

    def sample(self) -> float:
        """Do a part of the next reading of the counters; return the seconds until the next part. A job calls it."""
        if self._reading is None:
            self._reading = self._counters.totals()
        for totals in islice(self._reading, _STEPS):
            if totals is not None:
                self._reading = None
                reading = self._note(totals)
                if self._kept is not None:
                    point = between(self._kept, reading, self._wall(), self._counters.bounds)
                    self._points.append((self._number + 1, point))
                self._kept = reading
                return _POINT_EVERY
        return _PAUSE

    def _note(self, totals: Totals) -> FleetReading:
        """Keep a reading, and no more of the old ones than the next figures need."""
        parts, counters = self._parts, self._counters
        workers = healthy = 0
        for worker in parts.fleet:
            workers += 1
            healthy += worker.health is Health.HEALTHY
        reading = FleetReading(parts.clock(), totals, counters.queued(), counters.running(), healthy, workers)
        readings = self._readings
        readings.append(reading)
        while len(readings) > 2 and readings[1].now <= reading.now - _WINDOW:
            readings.popleft()
        return reading

    # -- viewers -------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Refuse a further viewer when there are too many, or when the router ends.

        Raises: RateLimited, ShuttingDown
        """
        if self._parts.ending:
            raise ShuttingDown
        if self.viewers >= MOST_VIEWERS:
            raise RateLimited(f"{MOST_VIEWERS} pages are open, the most at once. Close one.", retry_after=_WINDOW)

    def enter(self) -> None:
        """Count a viewer; the first one starts the assembly."""
        self.viewers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def leave(self) -> None:
        """Forget a viewer; the last one ends the assembly."""
        self.viewers -= 1
        if not self.viewers and self._task is not None:
            self._task.cancel()
            self._task = None
            self.witness.look_away()

    @property
    def ending(self) -> bool:
        """Whether viewers should leave: the router is about to stop."""
        return self._parts.ending

    async def next(self, seen: int) -> tuple[int, bytes]:
        """Wait for a frame that a viewer has not seen; return its number, and its JSON.

        seen  the number of the viewer's last one; 0: none
        """
        task = self._task
        while self._number <= seen or self._parts.clock() - self._made_at > 2 * _EVERY:
            if task is not None and task.done():
                task.result()  # raises what went wrong
            await self._next.wait()
        async with self._encoding:
            number, frame = self._number, self._encoded.get(seen)
            if frame is None:
                frame = await self._encode(number, seen)
                if number == self._number:
                    self._encoded[seen] = frame
            return number, frame

    async def _run(self) -> None:
        try:
            while True:
                wait = self._made_at + _EVERY - self._parts.clock()
                if wait > 0:
                    await asyncio.sleep(wait)
                await self._assemble()
                self._wake()
        finally:
            self._wake()

    def _wake(self) -> None:
        event, self._next = self._next, asyncio.Event()
        event.set()

    # -- the assembly --------------------------------------------------------------------------------------------------

    async def _assemble(self) -> None:
        """Make the next frame, in slices: what it says of one worker may be some milliseconds older than of another."""
        number = self._number + 1
        self.witness.look()
        (*_, totals) = await in_slices(self._counters.totals())
        assert totals is not None
        reading = self._note(totals)
        self._now = between(self._readings[0], reading, self._wall(), self._counters.bounds)
        present = dict.fromkeys([worker.id for worker in await in_slices(self._changed(number))])
        for missing in [each for each in self._rows if each not in present]:
            del self._rows[missing]
            self._gone[missing] = number
        for missing in [each for each, at in self._gone.items() if at <= number - _REMEMBERED]:
            del self._gone[missing]
        book = self._parts.decisions
        latest = [] if book is None else book.latest(_DECISIONS)
        if latest != self._decisions:
            self._decisions, self._decided = latest, number
        self._heard[number] = self.witness.number
        self._heard.pop(number - _REMEMBERED, None)
        self._encoded.clear()
        self._number, self._made_at = number, self._parts.clock()

    def _changed(self, number: int) -> Iterator[Worker]:
        """Bring the row of each worker up to date; yield the workers."""
        parts, rows, remembered, figures = (
            self._parts,
            self._rows,
            self._parts.fleet.pools.remembered,
            self.witness.figures,
        )
        for worker in list(parts.fleet):
            replica = None if parts.replicas is None else parts.replicas.describe(worker)
            row = row_of(worker, figures(worker.id), remembered(worker), self._epoch, replica)
            known = rows.get(worker.id)
            if known is None or known.row != row:
                rows[worker.id] = _Row(row, number)
            yield worker

    async def _encode(self, number: int, seen: int) -> bytes:
        """Encode the last frame for those who saw another one before; everything, if that was too long ago."""
        whole = seen not in self._heard
        seen = 0 if whole else seen
        rows = [entry.row for entry in self._rows.values() if entry.since > seen]
        encode = msgspec.json.Encoder().encode
        encoded = await in_slices(msgspec.Raw(encode(row)) for row in rows)
        replicas = self._parts.replicas
        assert self._now is not None
        frame = Frame(
            frame=number,
            whole=whole,
            at=round(self._wall(), 1),
            version=__version__,
            build=build(),
            policy=self.policy,
            uptime=round(self._parts.clock() - self._begun, 1),
            now=self._now,
            columns=COLUMNS,
            rows=cast("list[WorkerRow]", encoded),
            gone=[] if whole else [gone for gone, at in self._gone.items() if at > seen],
            points=[point for at, point in self._points if seen < at <= number],
            decisions=_lines(self._decisions) if self._decided > seen or whole else None,
            recorded=self._parts.decisions is not None,
            events=self.witness.between(0 if whole else self._heard[seen], self._heard[number]),
            shadow=self._counters.shadow(),
            scale=self._scale(),
            shared=self._counters.shared(),
            rolling=None if replicas is None else replicas.rolling,
        )
        return encode(frame)

    def _scale(self) -> dict[str, Any] | None:
        scaler = self._parts.autoscaler
        if scaler is None:
            return None
        explained = scaler.explain()
        return explained | {"decisions": explained["decisions"][:_SCALINGS]}


def _lines(records: Iterable[DecisionRecord]) -> list[DecisionSummary]:
    return [msgspec.convert(record, DecisionSummary, from_attributes=True) for record in records]
