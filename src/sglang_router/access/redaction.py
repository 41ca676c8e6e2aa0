"""Keep secrets out of what engines say: passwords, keys and tokens are replaced by `***` before an answer leaves.

    without_secrets(b'{"internal_states":[{"api_key":"sk-1","port":8000}]}', keys)
    --> b'{"internal_states": [{"api_key": "***", "port": 8000}]}'

Engines answer questions about themselves with all of their arguments and environment. What is a secret is told by its
name, at every depth: see `is_secret`. The name may also be a value itself: ["api_key", "K"], {"name": "api_key",
"default": "K"}. Texts are searched, too, for command lines (`--api-key K`), assignments (`HF_TOKEN=K`, `api_key: K`),
credentials in URLs, JSON inside of a text, and the keys that the router itself knows.

It fails closed: an answer in which something was found, or a field comes twice, is encoded again, what cannot be
decoded is refused, and what is nested too deeply is replaced. Decoding is as tolerant as that of Python engines (NaN,
lone surrogates), but bounded, because it blocks the event loop.
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
    r"|cookie|pwd|jwt|bearer|signingkey|masterkey|encryptionkey|sessionkey|^env$|^pass$|^auth$"
)
"""What the name of a secret contains, without its separators and in lower case."""
_TOKEN = re.compile(r"token(?!iz)")
_PLAIN = frozenset(("bostoken", "eostoken", "padtoken", "unktoken", "speculativetokenmap"))
"""Names with `token` whose text is no secret."""
_SEPARATORS = re.compile(r"[\W_]+")
_WORD = (
    r"(?:api[_-]?key|passw(?:or)?d|passphrase|pwd|secret|credential|access[_-]?key|private[_-]?key|signing[_-]?key"
    r"|master[_-]?key|token(?!iz|s))"
)
_NAMED = re.compile(
    rf"((?<![\w-])--?[\w-]{{0,40}}{_WORD}[\w-]{{0,20}}(?:=|\s)\s{{0,9}}"  # a flag
    rf"|\b[\w-]{{0,40}}{_WORD}[\w-]{{0,20}}[\\\"']{{0,4}}\s{{0,3}}[=:]\s{{0,3}}"  # an assignment, perhaps in JSON
    r"|\bauthorization[\\\"']{0,4}\s{0,3}[=:]\s{0,3}[\\\"']{0,4}(?:\w{1,16}\s{1,3})?|\bbearer\s{1,3}"
    r"|[?&](?:key|sig|signature)=)"
    r"(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^\s,;&]+)",
    re.IGNORECASE,
)
"""In a text: a flag, an assignment or an Authorization, and the secret behind it."""
_IN_URL = re.compile(r"(://)[^/\s@]{1,1024}(?=@)")
_FLAG = re.compile(rf"--?[\w-]{{0,40}}{_WORD}[\w-]{{0,20}}", re.IGNORECASE)
_NAMES = frozenset(("name", "key", "field", "option", "flag", "variable"))
"""Fields whose value may be the name of what the other fields of an object hold."""
_HINT = re.compile(r"key|pass|pwd|secret|credential|token(?!iz)|bearer|auth|sig|://", re.IGNORECASE)
"""What a text must contain to be searched further."""
_LONG_TEXT = 1 << 13
"""A longer text with a hint is not searched, but replaced."""
_SHORT_KEY = 6
"""Keys shorter than this are only found where they are a whole text: as a part of one they are too common."""
_DEEPEST = 64
"""Depth below which nothing is searched, but all is replaced."""


def is_secret(name: str, value: Any) -> bool:
    """Return whether the value of a field is a secret.

    Names with `token` are so often counts that only text (or what holds it) is taken for one.
    """
    kind = _kind_of(name[:256])
    if kind is _Kind.PLAIN or value in (None, "", False, True) or value in ([], {}):
        return False
    if kind is _Kind.SECRET:
        return True
    return _holds_text(value)


def _holds_text(value: Any, depth: int = 0) -> bool:
    """Return whether there is a text that is no number in a value, at any depth."""
    if isinstance(value, str):
        return not value.isdecimal()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > _DEEPEST or any(_holds_text(each, depth + 1) for each in inner)


def _names_secret(text: Any) -> bool:
    """Return whether a text is the name of a secret; with `token` it must end, as many other words contain that."""
    if not isinstance(text, str) or len(text) > 64 or " " in text:
        return False
    kind = _kind_of(text)
    return kind is _Kind.SECRET or (kind is _Kind.TOKEN and text.lower().endswith("token"))


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


def redacted(value: Any, keys: Collection[str] = (), depth: int = 0) -> Any:
    """Return a JSON value without secrets. keys: what must not be in any text; NaN and the infinities become null."""
    if isinstance(value, str):
        return _text(value, keys, depth)
    if depth > _DEEPEST and isinstance(value, (dict, list)):
        return STARS
    if isinstance(value, dict):
        named = any(_names_secret(inner) for name, inner in value.items() if name.lower() in _NAMES)
        return {
            _text(name, keys, depth): STARS
            if is_secret(name, inner) or (named and name.lower() not in _NAMES and _holds_text(inner))
            else redacted(inner, keys, depth + 1)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        if len(value) == 2 and _names_secret(value[0]) and _holds_text(value[1]):
            return [value[0], STARS]
        return _arguments([redacted(inner, keys, depth + 1) for inner in value])
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _arguments(values: list[Any]) -> list[Any]:
    """Return a list without the value behind a flag: ["--api-key", "K"]."""
    for at, value in enumerate(values[:-1]):
        if isinstance(value, str) and _FLAG.fullmatch(value) and isinstance(values[at + 1], str):
            values[at + 1] = STARS
    return values


def _text(text: str, keys: Collection[str], depth: int = 0) -> str:
    for key in keys:
        if key == text:
            return STARS
        if len(key) >= _SHORT_KEY and key in text:
            text = text.replace(key, STARS)
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            inner = json.loads(text)
        except ValueError:
            pass
        except RecursionError:
            return STARS
        else:
            found = redacted(inner, keys, depth + 1)
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


def may_hold_secrets(text: str, keys: Collection[str] = ()) -> bool:
    """Return whether a text must be searched further."""
    return _HINT.search(text) is not None or any(key in text for key in keys)


def label_without_secrets(name: str, value: str, keys: Collection[str] = ()) -> str:
    """Return the value of a label of a metric, escaped as it came, without secrets."""
    plain = value.replace(r"\"", '"').replace(r"\n", "\n").replace("\\\\", "\\")
    found = STARS if plain and _names_secret(name) else _text(plain, keys)
    return value if found == plain else found.replace("\\", "\\\\").replace('"', r"\"").replace("\n", r"\n")
