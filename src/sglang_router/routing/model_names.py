"""Names of models: what a worker announces, and how a client's spelling is compared with it.

Requests name a model as JSON text, so names are compared as JSON text, in one spelling: without needless escapes. PHP,
for one, writes "org\\/model".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

MOST_NAMES: Final = 64
"""Names that are believed of one worker; it may announce more."""
LONGEST_NAME: Final = 256
"""Characters of a name; what is longer, or does not print, is no name."""
LONGEST_TEXT: Final = 4 * LONGEST_NAME + 2
"""Bytes of a name as JSON text."""
LONGEST_SPELLING: Final = 12 * LONGEST_NAME + 2
"""The same with each character escaped, as two halves of a pair."""


class Names(NamedTuple):
    """The names by which an engine serves.

    bases     its model; several names of one model are usual
    adapters  what it can put on top of the model (LoRA)
    """

    bases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


NO_NAMES: Final = Names()
"""What a worker announces that announces nothing: it may serve any model."""


def is_name(value: object) -> bool:
    """Return whether this can be the name of a model."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def names_of(bases: Iterable[object], adapters: Iterable[object] = ()) -> Names:
    """Return the names among these values, each once, and not more than `MOST_NAMES`."""
    first = [str(name) for name in dict.fromkeys(filter(is_name, bases))][:MOST_NAMES]
    others = [str(name) for name in dict.fromkeys(filter(is_name, adapters)) if name not in first]
    return Names(tuple(first), tuple(others[: MOST_NAMES - len(first)]))


def text_of(name: str) -> bytes:
    """Return a name as JSON text."""
    return msgspec.json.encode(name)


def spelled(text: bytes) -> bytes:
    """Return the JSON text of a name in the spelling of `text_of`; any other text as it is."""
    try:
        return text_of(msgspec.json.decode(text, type=str))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return text


def plain_name(text: str) -> str:
    """Return the name of a model from its JSON text; what is no text as it is."""
    if not text.startswith('"'):
        return text
    if "\\" in text:
        try:
            return msgspec.json.decode(text, type=str)
        except (msgspec.MsgspecError, UnicodeError):
            pass
    return text[1:-1]


def joined(model: bytes, adapter: bytes) -> bytes:
    """Return SGLang's name for an adapter on a model; all are JSON text."""
    return b"%b:%b" % (model[:-1], adapter[1:])


def base_of(text: bytes) -> bytes:
    """Return the model of "model:adapter", SGLang's way to name an adapter; b"" for any other text."""
    base, colon, _ = text.partition(b":")
    return base + b'"' if colon else b""
