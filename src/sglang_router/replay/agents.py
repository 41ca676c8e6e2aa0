"""Agent sessions: each sends its next request some time after the answer to the one before, as an agent does.

One line is one session: {"b": block, "r": [[t, in, out, api_time, think_time, k, start, len, start, len, ...], ...]}.
`b` is the block size in tokens. A request has `in` tokens of prompt and `out` of answer, and is sent `think_time`
seconds after the previous answer. The first `k` blocks of its prompt are those of the request before it, the others
runs of `len` block numbers from `start` on. Numbers are local to a session. Entries that are no lists (sub-agents) are
left out.

So many sessions as `live` says run at once; when one ends, the next one of the file begins. The first ones begin at
random times within a minute. A pause counts as at most `think_cap` seconds; one that is null as none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from sglang_router.replay.load import UNIT, Load, LoadRequest, pages_of
from sglang_router.replay.reading import Lines

_BEGIN_WITHIN = 60.0
_ANSWERS = 1 << 31


class _Session:
    """A session that runs. entries: what is left of it; pages: of its last prompt."""

    __slots__ = ("entries", "line", "name", "pages", "space")

    def __init__(self, space: int, line: int, entries: list[Any]) -> None:
        self.space = space
        self.line = line
        self.name = b"session%d" % space
        self.entries = entries[::-1]
        self.pages = b""


class AgentSessions(Load):
    """See the module."""

    def __init__(self, lines: Lines, page: int, live: int, think_cap: float, seed: int) -> None:
        super().__init__(lines.path.name, page)
        self._lines = lines
        self._live = live
        self._think_cap = think_cap
        self._rng = random.Random(seed)
        self._left: Iterator[_Session] = iter(())
        self._running: dict[bytes, _Session] = {}
        self._asks = 0

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the first requests of the first sessions. Raises: ConfigError."""
        self._left = self._sessions()
        for at in sorted(self._rng.uniform(0.0, _BEGIN_WITHIN) for _ in range(self._live)):
            ask = self._begin(at)
            if ask is None:
                return
            yield ask

    def answered(self, ask: LoadRequest, now: float) -> LoadRequest | None:
        """Return the session's next request, or the first one of the next session. Raises: ConfigError."""
        session = self._running[ask.session]
        if not session.entries:
            del self._running[ask.session]
            return self._begin(now)
        return self._ask(session, now, pausing=True)

    def _sessions(self) -> Iterator[_Session]:
        lines = self._lines
        for space, line in enumerate(lines, 1):
            record = lines.object(line)
            if record.get("b") != self.page:
                raise lines.wrong(f"b is {record.get('b')} and not {self.page} as in the first line")
            entries = record.get("r")
            if not isinstance(entries, list):
                raise lines.wrong("r must be a list of requests")
            if requests := [entry for entry in entries if isinstance(entry, list)]:
                yield _Session(space, lines.number, requests)

    def _begin(self, at: float) -> LoadRequest | None:
        session = next(self._left, None)
        if session is None:
            return None
        self._running[session.name] = session
        return self._ask(session, at, pausing=False)

    def _ask(self, session: _Session, now: float, *, pausing: bool) -> LoadRequest:
        lines, entry = self._lines, session.entries.pop()
        last, lines.number = lines.number, session.line  # a mistake is in the line of the session
        if len(entry) < 6 or len(entry) % 2:
            raise lines.wrong("a request must have six numbers and then pairs of them")
        _, prompt, output, _, think, same, *runs = entry
        pages = session.pages[: lines.count(same, "k") * UNIT]
        for start, length in zip(runs[::2], runs[1::2], strict=True):
            pages += pages_of(session.space, lines.count(length, "len"), lines.count(start, "start", _ANSWERS - 1))
        session.pages = pages
        prompt, output = max(1, lines.count(prompt, "in")), max(1, lines.count(output, "out"))
        if len(pages) < prompt // self.page * UNIT:
            raise lines.wrong(f"{len(pages) // UNIT} blocks are too few for {prompt} tokens")
        self._asks += 1
        whole = pages[: prompt // self.page * UNIT]
        answer = pages_of(session.space, output // self.page + 2, _ANSWERS + self._asks % _ANSWERS)
        pause = min(lines.seconds(think or 0.0, "think_time"), self._think_cap) if pausing else 0.0
        lines.number = last
        return LoadRequest(self._asks, now + pause, whole + answer, prompt, output, session.name)
