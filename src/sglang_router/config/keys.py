"""API keys of clients and of the control plane, read from flags, the environment and files in one grammar each.

    of clients              KEY   or   NAME KEY     --api-key 'alice 5up3r'       --api-key-file FILE
    of the control plane    ID:NAME:ROLE:KEY        --control-plane-api-keys ..   --control-plane-api-keys-file FILE

A file or a variable has one entry per line; in a file, a line that begins with `#` is a comment. A key is visible ASCII
without spaces, so a space always ends the name. Everything after the third colon is the key, including further colons.
A file in YAML, TOML or JSON says more of each key: see `config.key_files`.

In the place of a key may stand its SHA-256, `sha256:` and 64 hexadecimal digits: then a file gives no key away.

No message and no `repr` in this module shows a key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TypeVar

from sglang_router.config import key_files, small_files
from sglang_router.config.key_files import Entry, KeyTerms, structured
from sglang_router.errors import ConfigError

ROLES = ("admin", "user")
TOKEN = "jwt:"  # noqa: S105
"""Begins what logs and limits call a client with a token of the identity provider (`access.tokens`); as in
`routing.quotas`, which is a room that knows no options; a test holds both equal."""
CONTROL_FORM = "ID:NAME:ROLE:KEY with the role admin or user"

_MARK = "~"
"""Stands before the digest of a subject that cannot be told from others at sight."""
_LONGEST_NAME = 100
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_ANOTHER = re.compile(r",[^:]+:[^:]*:(admin|user):")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_OTHERS = 0o006
"""Permission bits of users who are neither the owner nor in the group."""


class ClientKey(NamedTuple):
    """A key of a client. Logs show `name`; it is "" until `load` sets one."""

    name: str
    key: str

    def __repr__(self) -> str:
        return f"ClientKey({self.name!r}, ***)"


class ControlKey(NamedTuple):
    """A key of the control plane, its four parts in the reference router's order."""

    id: str
    name: str
    key: str
    role: str

    def __repr__(self) -> str:
        return f"ControlKey({self.id!r}, {self.name!r}, ***, {self.role!r})"


@dataclass(frozen=True)
class KeyRing:
    """All keys, without duplicates.

    warnings  for the log: files that other users of the machine may read
    terms     what applies to the clients with one name, where a file says it
    expires   when keys expire that do: seconds since 1970, by `digest_of` the key
    tokens    what applies to clients with tokens of the identity provider, by their subjects; see `key_files.read`
    """

    client: tuple[ClientKey, ...] = ()
    control: tuple[ControlKey, ...] = ()
    warnings: tuple[str, ...] = ()
    terms: Mapping[str, KeyTerms] = field(default_factory=dict)
    expires: Mapping[bytes, float] = field(default_factory=dict, repr=False)
    tokens: Mapping[str, KeyTerms] = field(default_factory=dict)


def digest_of(key: str) -> bytes:
    """Return the SHA-256 of a key, or the one that stands in its place."""
    hashed = _HASHED.fullmatch(key)
    return sha256(key.encode("ascii")).digest() if hashed is None else bytes.fromhex(hashed[1])


def name_of_subject(subject: str) -> str:
    """Return what logs and limits call the client with a token of this subject; no other subject has the same name."""
    shown = printable(subject)
    if shown == subject and _MARK not in subject:
        return TOKEN + shown
    return f"{TOKEN}{shown}{_MARK}{sha256(subject.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def printable(text: str) -> str:
    """Return a text of a token as it may stand in a log line."""
    return "".join(each if each.isprintable() else "?" for each in text[:_LONGEST_NAME])


# -- read from text ----------------------------------------------------------------------------------------------------


def lines(value: object) -> list[object]:
    """Return the entries of an option: the members of a list, or the lines of a text.

    Raises: ValueError for anything else.
    """
    if isinstance(value, str):
        return list(filter(None, map(str.strip, value.splitlines()))) or [""]
    if isinstance(value, (list, tuple)):
        return list(value)
    raise ValueError


def one_word(words: list[str]) -> object:
    """Check that a flag has exactly one word: `--api-key NAME KEY` would make a key of the name.

    Raises: ConfigError.
    """
    if len(words) != 1:
        raise ConfigError("each key needs a flag of its own; quote a name together with its key: 'NAME KEY'")
    return words


def client_keys(entries: list[object]) -> list[ClientKey]:
    """Check --api-key. Entries are texts, or keys that were read before.

    Raises: ValueError that names an entry by its number, never by its text.
    """
    return _each(entries, client_key)


def control_keys(entries: list[object]) -> list[ControlKey]:
    """Check --control-plane-api-keys. A tuple is read as (id, name, key, role).

    Raises: ValueError that names an entry by its number, never by its text.
    """
    return _each(entries, control_key)


def client_key(entry: object) -> ClientKey:
    """Read one entry: `KEY`, `NAME KEY`, or (name, key)."""
    parts = _parts(entry, lambda text: text.split())
    if len(parts) == 1:
        parts = ["", *parts]
    if len(parts) != 2:
        raise ValueError("this is not KEY or 'NAME KEY'")
    name, key = parts
    _check(key)
    if not name.isprintable():
        raise ValueError("the name contains characters that cannot be printed")
    if name.startswith(TOKEN):
        raise ValueError(f"the name must not begin with {TOKEN}, as those of clients with tokens do")
    return ClientKey(name, key)


def control_key(entry: object) -> ControlKey:
    """Read one entry: `id:name:role:key`, or (id, name, key, role)."""
    parts = _parts(entry, _split)
    if len(parts) != 4 or parts[3] not in ROLES:
        raise ValueError(f"this is not {CONTROL_FORM}")
    ident, name, key, role = parts
    if not _VISIBLE.fullmatch(ident) or not name.isprintable():
        raise ValueError("the id must be visible ASCII without spaces, and the name printable")
    _check(key)
    if _ANOTHER.search(key):
        raise ValueError("the key seems to contain the next entry; separate entries by lines or words, not by commas")
    return ControlKey(ident, name, key, role)


def _split(text: str) -> list[str]:
    ident, name, role, key, *_ = *(part.strip() for part in text.split(":", 3)), "", "", ""
    return [ident, name, key, role]


def _parts(entry: object, split: Callable[[str], list[str]]) -> list[str]:
    found = split(entry) if isinstance(entry, str) else list(entry) if isinstance(entry, (list, tuple)) else []
    if not all(isinstance(part, str) for part in found):
        raise ValueError("all parts of an entry must be texts")
    return found


def _check(key: str) -> None:
    if not _VISIBLE.fullmatch(key):
        raise ValueError("the key must consist of visible ASCII characters without spaces")


T = TypeVar("T")


def _each(entries: list[object], read: Callable[[object], T]) -> list[T]:
    found: list[T] = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(read(entry))
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}" if len(entries) > 1 else str(error)) from None
    return found


# -- load all of them --------------------------------------------------------------------------------------------------


def load(
    api_keys: Iterable[ClientKey] = (),
    api_key_file: str | None = None,
    control_plane_api_keys: Iterable[ControlKey] = (),
    control_plane_api_keys_file: str | None = None,
) -> KeyRing:
    """Load the keys of all four options. A client key without a name is named by its position: key-1, key-2.

    Raises: ConfigError for a file that cannot be used and for duplicate keys or ids; also for a key that is both a
    client's and the control plane's, because every client with it could then change the router.
    """
    clients = _placed("--api-key", api_keys)
    controls = _placed("--control-plane-api-keys", control_plane_api_keys)
    entries: list[tuple[Entry, str]] = []
    tokens: dict[str, KeyTerms] = {}
    if api_key_file is not None and structured(api_key_file):
        found, tokens = key_files.read(api_key_file, ("name", "key"), limits=True)
        for entry in found:
            texts = entry.texts
            clients.append((entry.where, _entry(entry, client_key, (texts.get("name", ""), texts.get("key", "")))))
            entries.append((entry, clients[-1][1].key))
    else:
        clients += _file(api_key_file, client_key)
    if control_plane_api_keys_file is not None and structured(control_plane_api_keys_file):
        found, _ = key_files.read(control_plane_api_keys_file, ("id", "name", "role", "key"), limits=False)
        for entry in found:
            parts = tuple(entry.texts.get(name, "") for name in ControlKey._fields)
            controls.append((entry.where, _entry(entry, control_key, parts)))
            entries.append((entry, controls[-1][1].key))
    else:
        controls += _file(control_plane_api_keys_file, control_key)
    keys = [(where, client.key) for where, client in clients] + [(where, control.key) for where, control in controls]
    _distinct([(where, digest_of(key).hex()) for where, key in keys], "key")
    _distinct([(where, control.id) for where, control in controls], "id")
    named = _named([client for _, client in clients])
    warnings = [exposure(path) for path in (api_key_file, control_plane_api_keys_file) if path]
    return KeyRing(
        tuple(named),
        tuple(control for _, control in controls),
        tuple(filter(None, warnings)),
        _terms(named, {key: entry for entry, key in entries}),
        {digest_of(key): entry.expires for entry, key in entries if entry.expires < math.inf},
        tokens,
    )


def _named(clients: list[ClientKey]) -> list[ClientKey]:
    """Name those without a name by their position; never by a name that another one was given."""
    given = {client.name for client in clients}
    found = []
    for place, client in enumerate(clients, 1):
        name = client.name or f"key-{place}"
        while not client.name and name in given:
            name += "-unnamed"
        found.append(ClientKey(name, client.key))
    return found


def _entry(entry: Entry, read: Callable[[object], T], parts: tuple[str, ...]) -> T:
    try:
        return read(parts)
    except ValueError as error:
        raise ConfigError(f"{entry.where}: {error}") from None


def _terms(clients: Iterable[ClientKey], entries: Mapping[str, Entry]) -> dict[str, KeyTerms]:
    """Return the terms by name. Raises: ConfigError, when two entries of one name differ."""
    found: dict[str, KeyTerms] = {}
    for client in clients:
        entry = entries.get(client.key)
        if entry is not None and found.setdefault(client.name, entry.terms) != entry.terms:
            raise ConfigError(f"{entry.where}: another key of this name has other limits; give both the same")
    return {name: terms for name, terms in found.items() if terms != KeyTerms()}


def exposure(path: str) -> str | None:
    """Return a warning if other users of this machine may read or change a file of secrets."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:  # it was deleted after it was read
        return None
    warning = f"{path} holds secrets and is open to everybody on this machine: run chmod o= {path}"
    return warning if mode & _OTHERS else None


def _placed(flag: str, found: Iterable[T]) -> list[tuple[str, T]]:
    return [(f"{flag}, entry {number}", each) for number, each in enumerate(found, 1)]


def _file(path: str | None, read: Callable[[object], T]) -> list[tuple[str, T]]:
    """Read the keys of a file, each with its path and line number."""
    if path is None:
        return []
    found: list[tuple[str, T]] = []
    for number, line in enumerate(_text(Path(path)).split("\n"), 1):
        entry = line.strip()
        if entry and not entry.startswith("#"):
            try:
                found.append((f"{path}:{number}", read(entry)))
            except ValueError as error:
                raise ConfigError(f"{path}:{number}: {error}") from None
    if not found:  # an empty file must not open the router to everybody by accident
        raise ConfigError(f"{path} contains no keys; to accept requests without keys, omit the option")
    return found


def _text(path: Path) -> str:
    try:
        return small_files.read(path, pipe=True).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None


def _distinct(placed: list[tuple[str, str]], what: str) -> None:
    first: dict[str, str] = {}
    for where, value in placed:
        if value in first:
            raise ConfigError(f"{where}: the same {what} as in {first[value]}; give each {what} once only")
        first[value] = where
