"""Read the members of a JSON object as tolerantly as Python engines do, for bodies that the fast reader refuses.

    members(b'{"text": "cut \\ud83d", "n": NaN}')  -->  {"text": b'"cut \\ud83d"', "n": b"NaN"}

SGLang and vLLM read bodies with `json.loads`: it takes half of a surrogate pair (a text cut inside of an emoji), NaN, a
byte-order mark, and UTF-16. Whoever is stricter refuses requests that the engine would serve. The body is relayed as it
came in any case; routing only needs the raw bytes of some values, so this walks over the object's members with the
parts of the standard library's decoder, which is several times slower than msgspec.
"""

from __future__ import annotations

import json
import re
from typing import Final

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_DECODER: Final = json.JSONDecoder()


def members(body: bytes) -> dict[str, bytes]:
    """Return the raw JSON of each member; of several with the same name the last one counts, as for engines.

    Raises: ValueError, when `json.loads` would refuse the body, or it is not an object; RecursionError.
    """
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        json.loads(text)  # says what is wrong, unless it is another kind of value
        raise ValueError("Expected an object")
    found: dict[str, bytes] = {}
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        name, at = _name(text, at, first=not found)
        start = _skip(text, at)
        _, at = _DECODER.raw_decode(text, start)
        found[name] = text[start:at].encode("utf-8", "surrogatepass")
        at = _skip(text, at)
        if text[at : at + 1] not in (",", "}"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    at = _skip(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return found


def in_utf8(body: bytes | bytearray) -> bytes | bytearray:
    """Return a body in UTF-8: the same object, unless `json.loads` would take it for UTF-16 or UTF-32.

    Raises: UnicodeDecodeError.
    """
    encoding = json.detect_encoding(body[:4])
    if encoding.startswith("utf-8"):
        return body
    return body.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")


def _name(text: str, at: int, first: bool) -> tuple[str, int]:
    """Return a member's name, and where the colon behind it ends. `at`: at the comma, or behind the brace (`first`)."""
    if not first:
        at = _skip(text, at + 1)
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    name, at = _DECODER.raw_decode(text, at)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
    return name, at + 1


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space is not None else at
