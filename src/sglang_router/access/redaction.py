"""Keep secrets out of what engines say: passwords, keys and tokens are replaced by `***` before an answer leaves.

    without_secrets(b'{"internal_states":[{"api_key":"sk-1","port":8000}]}', keys)
    --> b'{"internal_states": [{"api_key": "***", "port": 8000}]}'

Engines answer questions about themselves with all of their arguments and environment. What is a secret is told by its
name, at every depth: see `is_secret`. Texts are searched, too, for command lines (`--api-key K`), assignments
(`HF_TOKEN=K`), credentials in URLs, JSON inside of a text, and the keys that the router itself knows.

It fails closed: an answer in which something was found, or a field comes twice, is encoded again, and what cannot be
decoded is refused. Decoding is as tolerant as that of Python engines (NaN, lone surrogates), but bounded, because it
blocks the event loop.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from enum import Enum
from functools import lru_cache
from typing import Any

from sglang_router.errors import WorkerInvalid

STARS = "***"
MOST_BYTES = 1 << 20
"""The longest answer of an engine that is searched and passed on."""

_ALWAYS = re.compile(
    r"apikey|password|passwd|passphrase|secret|credential|authorization|privatekey|accesskey|authkey|envvars|environ"
    r"|cookie|^env$"
)
"""What the name of a secret contains, without its separators and in lower case."""
_TOKEN = re.compile(r"token(?!iz)")
_PLAIN = frozenset(("bostoken", "eostoken", "padtoken", "unktoken", "speculativetokenmap"))
"""Names with `token` whose text is no secret."""
_SEPARATORS = re.compile(r"[\W_]+")
_WORD = r"(?:api[_-]?key|passw(?:or)?d|passphrase|secret|credential|access[_-]?key|private[_-]?key|token(?!iz|s))"
_NAMED = re.compile(
    rf"((?<![\w-])--?[\w-]{{0,40}}{_WORD}[\w-]{{0,20}}[\s=]\s{{0,3}}|\b\w{{0,40}}{_WORD}\w{{0,20}}\s{{0,3}}=\s{{0,3}}|\bbearer\s{{1,3}})"
    r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&]+)",
    re.IGNORECASE,
)
"""In a text: a flag, an assignment or an Authorization, and the secret behind it."""
_IN_URL = re.compile(r"(://[^/\s:@]{0,128}:)[^/\s@]+(?=@)")
_FLAG = re.compile(rf"--?[\w-]{{0,40}}{_WORD}[\w-]{{0,20}}", re.IGNORECASE)
_HINT = re.compile(r"key|pass|secret|credential|token(?!iz)|bearer|://", re.IGNORECASE)
"""What a text must contain to be searched further."""
_LONG_TEXT = 1 << 13
"""A longer text with a hint is not searched, but replaced."""
_SHORT_KEY = 6
"""Keys shorter than this are only found where they are a whole text: as a part of one they are too common."""


def is_secret(name: str, value: Any) -> bool:
    """Return whether the value of a field is a secret.

    Names with `token` are so often counts that only text (or what holds it) is taken for one.
    """
    kind = _kind_of(name[:256])
    if kind is _Kind.PLAIN or value in (None, "", False, True) or value in ([], {}):
        return False
    if kind is _Kind.SECRET:
        return True
    texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and not text.isdecimal() for text in texts)


class _Kind(Enum):
    """What the name of a field tells of its value."""

    PLAIN = 0
    SECRET = 1
    TOKEN = 2


@lru_cache(maxsize=2048)
def _kind_of(name: str) -> _Kind:
    plain = _SEPARATORS.sub("", name).lower()
    if _ALWAYS.search(plain):
        return _Kind.SECRET
    return _Kind.TOKEN if _TOKEN.search(plain) and plain not in _PLAIN else _Kind.PLAIN


def redacted(value: Any, keys: Collection[str] = ()) -> Any:
    """Return a JSON value without secrets. keys: what must not be in any text; NaN and the infinities become null.

    Raises: RecursionError, when it is nested too deeply.
    """
    if isinstance(value, str):
        return _text(value, keys)
    if isinstance(value, dict):
        found = {
            _text(name, keys): STARS if is_secret(name, inner) else redacted(inner, keys)
            for name, inner in value.items()
        }
        if isinstance(value.get("name"), str) and is_secret(value["name"], value.get("value")):
            found["value"] = STARS
        return found
    if isinstance(value, list):
        return _arguments([redacted(inner, keys) for inner in value])
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _arguments(values: list[Any]) -> list[Any]:
    """Return a list without the value behind a flag: ["--api-key", "K"]."""
    for at, value in enumerate(values[:-1]):
        if isinstance(value, str) and _FLAG.fullmatch(value) and isinstance(values[at + 1], str):
            values[at + 1] = STARS
    return values


def _text(text: str, keys: Collection[str]) -> str:
    for key in keys:
        if key == text:
            return STARS
        if len(key) >= _SHORT_KEY and key in text:
            text = text.replace(key, STARS)
    if text[:1] in ("{", "["):
        try:
            inner = json.loads(text)
        except ValueError:
            pass
        else:
            found = redacted(inner, keys)
            return text if found == inner else json.dumps(found)
    if _HINT.search(text) is None:
        return text
    if len(text) > _LONG_TEXT:
        return STARS
    if "://" in text:
        text = _IN_URL.sub(rf"\1{STARS}", text)
    return _NAMED.sub(rf"\1{STARS}", text)


def without_secrets(body: bytes, keys: Collection[str] = ()) -> bytes:
    """Return an engine's JSON without secrets; an empty answer stays empty.

    Raises: WorkerInvalid, when it is not JSON or longer than `MOST_BYTES`, so that it cannot be searched.
    """
    if not body:
        return body
    if len(body) > MOST_BYTES:
        raise WorkerInvalid(f"The worker's answer is longer than {MOST_BYTES} bytes, so it is not passed on.")
    try:
        value = json.loads(body, object_pairs_hook=_Object)
        found = redacted(value, keys)
        return body if found == value else json.dumps(found, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        raise WorkerInvalid("The worker's answer is not JSON, so it is not passed on: it may hold secrets.") from None


class _Object(dict[str, Any]):
    """A JSON object. One that had a field twice is equal to no other, so that its first value never passes."""

    __hash__ = None

    def __init__(self, fields: list[tuple[str, Any]]) -> None:
        super().__init__(fields)
        self._twice = len(self) < len(fields)

    def __eq__(self, other: object) -> bool:
        return not self._twice and super().__eq__(other)


def text_without_secrets(text: str, keys: Collection[str] = ()) -> str:
    """Return a text of an engine that is not JSON without secrets."""
    return _text(text, keys)
