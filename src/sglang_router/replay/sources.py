"""Which load a trace is: a generated one, or a file whose format its first line shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sglang_router.errors import ConfigError
from sglang_router.replay.agents import AgentSessions
from sglang_router.replay.generator import generated
from sglang_router.replay.load import Load, LoadRequest
from sglang_router.replay.options import ReplayOptions
from sglang_router.replay.reading import Lines
from sglang_router.replay.recorded import FORMAT, RecordedDecisions
from sglang_router.replay.traces import AZURE_HEADER, Azure, Mooncake

_GENERATED = "gen:"


class FirstRequests(Load):
    """The first `most` requests of another load."""

    def __init__(self, load: Load, most: int) -> None:
        super().__init__(load.name, load.page)
        self._load = load
        self._left = most

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the requests as long as some are left."""
        for ask in self._load.arrivals():
            if self._left <= 0:
                return
            self._left -= 1
            yield ask

    def answered(self, ask: LoadRequest, now: float) -> LoadRequest | None:
        """Return the following request if one is left."""
        if self._left <= 0:
            return None
        following = self._load.answered(ask, now)
        self._left -= following is not None
        return following


def load_of(options: ReplayOptions, seed: int) -> Load:
    """Return the load of the options. Raises: ConfigError."""
    if options.trace.startswith(_GENERATED):
        load = generated(options.trace.removeprefix(_GENERATED), seed)
    else:
        load = _recorded(options, seed)
    return FirstRequests(load, options.requests) if options.requests else load


def _recorded(options: ReplayOptions, seed: int) -> Load:
    lines = Lines(Path(options.trace))
    first = next(iter(lines), None)
    if first is None:
        raise ConfigError(f"{options.trace}: the file is empty")
    if first.replace(" ", "") == AZURE_HEADER:
        return Azure(lines, options.speedup)
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        if record.get("format") == FORMAT:
            return RecordedDecisions(lines, record, options.speedup)
        if "hash_ids" in record:
            return Mooncake(lines, options.speedup)
        if "r" in record and "b" in record:
            page = lines.count(record["b"], "b")
            if not page:
                raise lines.wrong("b must not be 0")
            return AgentSessions(lines, page, options.live, options.think_cap, seed)
    raise lines.wrong(
        "not a trace that can be replayed: it must begin as a decision log, a Mooncake trace, an Azure trace or agent"
        " sessions do"
    )
