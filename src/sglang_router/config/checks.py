"""What a value must be beyond its type: ranges, addresses, names.

A check takes the value as read and returns it, perhaps in its normal form, or raises ValueError. A `Range`
raises without a message, because the option can put its bounds into the sentence; the others say what is
wrong.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from sglang_router.config.urls import parse_worker_url

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VISIBLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Range:
    """low <= value <= high; with `open`, low < value. Its text completes "a number ..."."""

    low: float
    high: float | None = None
    open: bool = False

    def __call__(self, value: float) -> float:
        too_low = value <= self.low if self.open else value < self.low
        if too_low or (self.high is not None and value > self.high):
            raise ValueError
        return value

    def __str__(self) -> str:
        if self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        return f"above {self.low:g}" if self.open else f"of at least {self.low:g}"


def at_least(low: float) -> Range:
    return Range(low)


def above(low: float) -> Range:
    return Range(low, open=True)


def between(low: float, high: float) -> Range:
    return Range(low, high)


def worker_urls(urls: list[str]) -> list[str]:
    """The URLs in their normal form; each may be there once."""
    normal: list[str] = []
    for url in map(parse_worker_url, urls):
        if url in normal:
            raise ValueError(f"worker URL {url} is given twice")
        normal.append(url)
    return normal


def address(host: str) -> str:
    """A name or IP address to listen on; the brackets around an IPv6 address may stay away."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not _VISIBLE.fullmatch(bare) or any(character in bare for character in "/[]@"):
        raise ValueError(f"{host!r} is not a host name or an IP address")
    return bare


def path(value: str) -> str:
    """A path that can stand in a request line."""
    if not value.startswith("/") or not _VISIBLE.fullmatch(value):
        raise ValueError(f"{value!r} is not a path: it must begin with / and hold no spaces")
    return value


def header_names(names: list[str]) -> list[str]:
    """Names of header fields, in lower case."""
    for name in names:
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a header")
    return [name.lower() for name in names]


def bearer_key(key: str) -> str:
    """A key that can stand in an Authorization header."""
    if not _VISIBLE.fullmatch(key):
        raise ValueError("the key must consist of visible ASCII characters without spaces")
    return key


def buckets(bounds: list[float]) -> list[float]:
    """Upper bounds of a histogram."""
    if not bounds or bounds[0] <= 0 or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError("the buckets must be positive and ascending")
    return bounds
