"""Files of keys that say more of each key: YAML, TOML or JSON, by the end of their names.

    keys:
      - name: alice                      # the access log and the metrics show it
        key: sha256:9f86d08...           # the key itself, or its SHA-256
        expires: 2027-01-31T12:00:00Z    # a date counts from its first second in UTC
        requests_per_second: 5
        burst: 20
        max_concurrent_requests: 8
        tokens_per_minute: 100000
        priority: normal
        max_priority: high
        models: [llama-3, qwen-3]

    tokens:                              # clients with a token of the identity provider (--jwt-issuer)
      - subject: bob
        requests_per_second: 5
      - subject: "*"                     # each other one
        requests_per_second: 1

Only `key` is needed, or `subject`. Entries with one name are keys of one client: they share its limits, and so must say
the same. A file of keys of the control plane has `id`, `name`, `role`, `key` and `expires`, and no `tokens`.

No message of this module shows a value, nor the name of an unknown field: both may be a key in the wrong place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from sglang_router.config import option_files
from sglang_router.errors import ConfigError

ENDS = (".yaml", ".yml", ".toml", ".json")
ANYBODY = "*"
"""The subject that stands for all clients with tokens that no other entry names."""
MOST_PRIORITY = 20
_LEAST = 1e-6
"""Smallest rate: the pause that a much smaller one asks for is no number of seconds any more."""
PRIORITIES = {"system": 20, "interactive": 10, "high": 10, "default": 0, "normal": 0, "bulk": -10, "low": -10}
"""As in `wire.request_id`, which is a room further up; a test holds both equal."""


class KeyTerms(NamedTuple):
    """What applies to the clients with one name; None: nothing is said.

    requests_per_second      with bursts of `burst` requests
    max_concurrent_requests  in flight at once
    tokens_per_minute        of prompts and answers together
    priority, max_priority   of its requests; the highest that they may ask for
    models                   that they may ask for
    """

    requests_per_second: float | None = None
    burst: float | None = None
    max_concurrent_requests: int | None = None
    tokens_per_minute: float | None = None
    priority: int | None = None
    max_priority: int | None = None
    models: tuple[str, ...] | None = None


class Entry(NamedTuple):
    """One entry of a file: its texts by field, and its terms. expires: seconds since 1970; infinity: never."""

    where: str
    texts: Mapping[str, str]
    terms: KeyTerms
    expires: float = math.inf


def structured(path: str | None) -> bool:
    """Return whether a file of keys says more of each key, by the end of its name."""
    return path is not None and path.lower().endswith(ENDS)


def read(path: str, texts: tuple[str, ...], limits: bool) -> tuple[list[Entry], dict[str, KeyTerms]]:
    """Return the entries of a file, and the terms of clients with tokens by their subjects; `ANYBODY`: of all others.

    texts   the fields of an entry that are texts
    limits  whether an entry may have the fields of KeyTerms, and the file `tokens`

    Raises: ConfigError.
    """
    content = option_files.parse(Path(path), ENDS)
    entries, subjects = content.get("keys"), content.get("tokens", []) if limits else []
    if content.keys() - ({"tokens"} if limits else set()) != {"keys"} or not isinstance(entries, list) or not entries:
        more = ", and perhaps a list `tokens`" if limits else ""
        raise ConfigError(f"{path} must hold a list `keys` of mappings{more}, and nothing else; see docs/security.md")
    found = [_entry(f"{path}, entry {number}", each, texts, limits) for number, each in enumerate(entries, 1)]
    if not isinstance(subjects, list):
        raise ConfigError(f"{path}: `tokens` must be a list of mappings; see docs/limits.md")
    return found, _tokens(path, subjects)


def _tokens(path: str, entries: list[object]) -> dict[str, KeyTerms]:
    found: dict[str, KeyTerms] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{path}, token {number}"
        fields = ("subject", *KeyTerms._fields)
        if not isinstance(entry, dict) or not entry.keys() <= set(fields) or "subject" not in entry:
            raise ConfigError(f"{where}: it must be a mapping with `subject`, and perhaps {', '.join(fields[1:])}")
        subject = _read(where, "subject", entry["subject"], _subject)
        if subject in found:
            raise ConfigError(f"{where}: this subject is there twice")
        found[subject] = terms_of(where, {name: value for name, value in entry.items() if value is not None})
    return found


def _entry(where: str, entry: object, texts: tuple[str, ...], limits: bool) -> Entry:
    fields = (*texts, "expires", *(KeyTerms._fields if limits else ()))
    if not isinstance(entry, dict) or not entry.keys() <= set(fields):
        raise ConfigError(f"{where}: it must be a mapping with some of the fields {', '.join(fields)}, and no others")
    given = {name: value for name, value in entry.items() if value is not None}
    words: dict[str, str] = {}
    for name in filter(given.__contains__, texts):
        words[name] = _read(where, name, given[name], _text)
    return Entry(where, words, terms_of(where, given), _read(where, "expires", given.get("expires", math.inf), _moment))


def terms_of(where: str, given: Mapping[object, object]) -> KeyTerms:
    """Return the terms that the fields of an entry make; other fields are left alone. Raises: ConfigError."""
    found = KeyTerms(
        **{name: _read(where, name, given[name], _READERS[name]) for name in KeyTerms._fields if name in given}
    )
    if found.burst is not None and found.requests_per_second is None:
        raise ConfigError(f"{where}: `burst` belongs to `requests_per_second`; give both")
    if found.priority is not None and found.max_priority is not None and found.priority > found.max_priority:
        raise ConfigError(f"{where}: `priority` must not be above `max_priority`")
    return found


def _read(where: str, name: str, value: object, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except (ValueError, TypeError, OverflowError) as error:
        expected = str(error) if isinstance(error, _Expected) else "something else"
        raise ConfigError(f"{where}: `{name}` must be {expected}") from None


class _Expected(ValueError):
    """The message completes the phrase "must be ..."."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Expected("a text; quote a number")
    return value.strip()


def _subject(value: object) -> str:
    if not isinstance(value, str):
        raise _Expected('the subject of a token, or "*" for all others; quote a number')
    return value


def _moment(value: object) -> float:
    """Return seconds since 1970 of what a file has: a text in ISO 8601, or a date or time of YAML or TOML."""
    if value is math.inf:
        return math.inf
    if isinstance(value, str):
        text = value.strip()
        try:
            value = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in "Zz" else text)
        except ValueError:
            value = None
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=timezone.utc).timestamp()
    raise _Expected("a date or a time, as in 2027-01-31 or 2027-01-31T12:00:00Z")


def positive(value: object) -> float:
    """Return a number above 0. Raises: ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _LEAST <= value < math.inf:
        raise _Expected(f"a number above 0 (at least {_LEAST:.6f})")
    return float(value)


def _burst(value: object) -> float:
    if positive(value) < 1:
        raise _Expected("a number of at least 1")
    return positive(value)


def count(value: object) -> int:
    """Return a whole number of at least 1. Raises: ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _Expected("a whole number of at least 1")
    return value


def priority(value: object) -> int:
    """Return a priority: a whole number, or its name. Raises: ValueError."""
    number = PRIORITIES.get(value.lower()) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int) or not -MOST_PRIORITY <= number <= MOST_PRIORITY:
        names = ", ".join(PRIORITIES)
        raise _Expected(f"a whole number from -{MOST_PRIORITY} to {MOST_PRIORITY}, or one of {names}")
    return number


def _models(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise _Expected("a list of names of models")
    return tuple(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "requests_per_second": positive,
    "burst": _burst,
    "max_concurrent_requests": count,
    "tokens_per_minute": positive,
    "priority": priority,
    "max_priority": priority,
    "models": _models,
}
