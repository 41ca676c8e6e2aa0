"""Traces of requests that come at given times: Mooncake's JSON lines and Azure's CSV.

    Mooncake   {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [id, ...]}: one id for each block of
               512 tokens; equal ids are equal prefixes
    Azure      TIMESTAMP,ContextTokens,GeneratedTokens: arrivals and lengths; no two prompts have anything in common

Times count from the first request. Answers are not reused: the traces do not say which prompt continues them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from sglang_router.replay.load import UNIT, Load, LoadRequest, pages_of
from sglang_router.replay.reading import Lines

MOONCAKE_BLOCK = 512
_PAGE = 64
_MIX = 2654435761
"""An odd number: times it, modulo 2^32, different ids are different numbers that are far apart."""
_ANSWERS = 1 << 31
_DIGITS = 20
"""Digits of a number that are read: one with more is too large in any case."""
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


class Mooncake(Load):
    """A Mooncake trace."""

    def __init__(self, lines: Lines, speedup: float) -> None:
        super().__init__(lines.path.name, _PAGE)
        self._lines = lines
        self._speedup = speedup

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the requests. Raises: ConfigError."""
        lines, first = self._lines, -1.0
        for line in lines:
            record = lines.object(line)
            at = lines.seconds(record.get("timestamp"), "timestamp") / 1000
            first = at if first < 0.0 else first
            prompt = max(1, lines.count(record.get("input_length"), "input_length"))
            output = max(1, lines.count(record.get("output_length"), "output_length"))
            ids = record.get("hash_ids")
            if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < _ANSWERS for each in ids):
                raise lines.wrong("hash_ids must be a list of numbers")
            if len(ids) * MOONCAKE_BLOCK < prompt:
                raise lines.wrong(f"{len(ids)} hash_ids are too few for {prompt} tokens")
            pages = _blocks(ids)[: prompt // _PAGE * UNIT] + _own(lines.number, output)
            yield LoadRequest(lines.number, (at - first) / self._speedup, pages, prompt, output)


def _blocks(ids: Sequence[int]) -> bytes:
    return b"".join([pages_of(each * _MIX % (1 << 32), MOONCAKE_BLOCK // _PAGE, each) for each in ids])


def _own(number: int, tokens: int) -> bytes:
    """Return pages that nobody else has, enough for so many tokens."""
    return pages_of(number, tokens // _PAGE + 2, _ANSWERS)


class Azure(Load):
    """An Azure trace."""

    def __init__(self, lines: Lines, speedup: float) -> None:
        super().__init__(lines.path.name, _PAGE)
        self._lines = lines
        self._speedup = speedup

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the requests. Raises: ConfigError."""
        lines, first = self._lines, -1.0
        for line in lines:
            if lines.number == 1:
                continue
            fields = line.split(",")
            if len(fields) != 3:
                raise lines.wrong(f"{len(fields)} fields and not three: {AZURE_HEADER}")
            at = self._time(fields[0])
            first = at if first < 0.0 else first
            prompt = max(1, self._count(fields[1], "ContextTokens"))
            output = max(1, self._count(fields[2], "GeneratedTokens"))
            yield LoadRequest(
                lines.number, (at - first) / self._speedup, _own(lines.number, prompt + output), prompt, output
            )

    def _time(self, text: str) -> float:
        whole, _, fraction = text.partition(".")
        try:
            seconds = (datetime.fromisoformat(whole) - datetime(1970, 1, 1)).total_seconds()
            return seconds + float(f"0.{fraction or 0}")
        except (ValueError, TypeError):
            raise self._lines.wrong("TIMESTAMP is not a time, as 2023-11-16 18:15:46.6805900") from None

    def _count(self, text: str, name: str) -> int:
        if not text.isascii() or not text.isdigit():
            raise self._lines.wrong("ContextTokens and GeneratedTokens must be whole numbers")
        return self._lines.count(int(text[:_DIGITS]), name)
