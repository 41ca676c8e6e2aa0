"""The router's own decision log: what it routed can be routed again, by other policies and with other engines.

    {"format": "sglang-router-decisions", "version": 1, "block": 256}
    {"t": 1764279000.1, "session": "s1", "bytes": 4000, "chain": ["9f..", ...], "prompt_tokens": 990, ...}

A line without `t` is no request. `t` is when it came, in seconds. `chain` has a hash for each whole block of the
prompt's text; equal hashes are equal beginnings, so no prompt text is needed. A block is one page. How many tokens it
is follows from the first requests for which the log has the tokens that the engine reported, else four bytes are a
token; the length of each prompt follows from its bytes. An answer without `completion_tokens` counts as 128 tokens.

A line is written when its request has ended. So requests are put in order while they are read, as far as they are not
more than some thousand lines apart.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from itertools import islice
from typing import Any

from sglang_router.replay.load import UNIT, Load, LoadRequest, pages_of
from sglang_router.replay.reading import MOST_BYTES, Lines

FORMAT = "sglang-router-decisions"
_VERSION = 1
_BYTES_PER_TOKEN = 4.0
_SAMPLE = 1000
_WINDOW = 8192
_OUTPUT = 128
_OWN = 1 << 31


class RecordedDecisions(Load):
    """A decision log."""

    def __init__(self, lines: Lines, header: dict[str, Any], speedup: float) -> None:
        if header.get("version") != _VERSION:
            raise lines.wrong(f"a decision log of version {header.get('version')}; known is {_VERSION}")
        block = lines.count(header.get("block"), "block")
        if not block:
            raise lines.wrong("block must not be 0")
        self._lines = lines
        self._speedup = speedup
        ratio = self._tokens_per_byte()
        super().__init__(lines.path.name, max(1, round(block * ratio)))
        self._per_byte = self.page / block

    def _tokens_per_byte(self) -> float:
        tokens = size = 0
        for record in islice(self._records(), _SAMPLE):
            if record.get("prompt_tokens") and record.get("bytes"):
                tokens += self._lines.count(record["prompt_tokens"], "prompt_tokens")
                size += self._lines.count(record["bytes"], "bytes", MOST_BYTES)
        return tokens / size if tokens else 1 / _BYTES_PER_TOKEN

    def _records(self) -> Iterator[dict[str, Any]]:
        """Give the lines that are requests."""
        for line in self._lines:
            record = self._lines.object(line)
            if "t" in record:
                yield record

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the requests. Raises: ConfigError."""
        queue: list[tuple[float, int, LoadRequest]] = []
        first = -1.0
        for record in self._records():
            ask = self._ask(record)
            heapq.heappush(queue, (ask.at, ask.number, ask))
            if len(queue) > _WINDOW:
                ask = heapq.heappop(queue)[2]
                first = ask.at if first < 0.0 else first
                yield self._moved(ask, first)
        while queue:
            ask = heapq.heappop(queue)[2]
            first = ask.at if first < 0.0 else first
            yield self._moved(ask, first)

    def _moved(self, ask: LoadRequest, first: float) -> LoadRequest:
        ask.at = max(0.0, ask.at - first) / self._speedup
        return ask

    def _ask(self, record: dict[str, Any]) -> LoadRequest:
        lines, number = self._lines, self._lines.number
        at = lines.seconds(record.get("t"), "t")
        prompt = max(1, round(lines.count(record.get("bytes"), "bytes", MOST_BYTES) * self._per_byte))
        output = max(1, lines.count(record.get("completion_tokens") or _OUTPUT, "completion_tokens"))
        chain = record.get("chain") or []
        if not isinstance(chain, list):
            raise lines.wrong("chain must be a list of hashes")
        pages = b"".join([_unit(each) for each in chain])[: prompt // self.page * UNIT]
        own = (prompt + output) // self.page - len(pages) // UNIT + 1
        session = str(record.get("session") or "").encode("utf-8", "surrogatepass")
        pages += pages_of(number, own, _OWN)
        return LoadRequest(number, at, pages, prompt, output, session, record.get("stream") is not False)


def _unit(hashed: object) -> bytes:
    """Return the unit of a page with this hash, whatever its form."""
    return hashlib.blake2b(str(hashed).encode("utf-8", "surrogatepass"), digest_size=UNIT).digest()
