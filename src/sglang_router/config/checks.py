"""What a value must be beyond its type: ranges, addresses, names.

A check takes the value as read and returns it, perhaps in its normal form, or raises ValueError. A `Range`
raises without a message, because the option can put its bounds into the sentence; the others say what is
wrong.
"""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from urllib.parse import urlsplit

from sglang_router.config.urls import parse_worker_url

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?/?")
_PORTS = {"http": "80", "https": "443"}


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


def scale_range(text: str) -> str:
    """MIN:MAX in its plain form, whole numbers with 0 <= MIN <= MAX and 1 <= MAX."""
    low, separator, high = (part.strip() for part in text.partition(":"))
    if not (separator and low.isdecimal() and high.isdecimal() and len(low + high) < 12):
        raise ValueError(f"{text!r} is not MIN:MAX, as in 1:8")
    if not int(low) <= int(high) or int(high) < 1:
        raise ValueError(f"{text!r}: MIN must not be above MAX, and MAX must be at least 1")
    return f"{int(low)}:{int(high)}"


def webhook(url: str) -> str:
    """An http or https URL with a host; credentials in it would end in logs."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, or brackets without an address
        sound = False
    if not sound or not _VISIBLE.fullmatch(url):
        raise ValueError("the webhook must be a URL that begins with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError("the webhook's URL must not hold credentials; messages are signed, see --scale-webhook-secret")
    return url


def command(text: str) -> str:
    """Words of a command, as a shell would split them."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the command cannot be read: {error}") from None
    if not words:
        raise ValueError("the command is empty")
    return text


def address(host: str) -> str:
    """A name or IP address to listen on; the brackets around an IPv6 address may stay away."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not _VISIBLE.fullmatch(bare) or any(character in bare for character in "/[]@"):
        raise ValueError(f"{host!r} is not a host name or an IP address")
    return bare


def origins(texts: list[str]) -> list[str]:
    """Origins as browsers send them (RFC 6454): scheme, host, and a port that is not the scheme's own; or `*`."""
    return [text if text == "*" else _origin(text) for text in texts]


def _origin(text: str) -> str:
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not an origin, as in https://chat.example.com")
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" + (f":{port}" if port and port != _PORTS.get(scheme) else "")


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
