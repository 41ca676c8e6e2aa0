"""Reads a streamed answer to `/v1/completions` when all of it is there: text, tokens, and whether it is whole. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

_PREFIX, _DONE = b"data: ", b"[DONE]"


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None


class Choice(msgspec.Struct):
    text: str = ""


class Event(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None


class Answer(NamedTuple):
    """What came back. Tokens as the engine reports them.

    error  why it is no answer; "" when it is one
    """

    error: str
    text: str = ""
    prompt: int = 0
    cached: int = 0
    output: int = 0


def read(raw: bytes, output: int) -> Answer:
    """Return what a response says; `output` tokens are expected. The connection has ended after it."""
    head, end, body = raw.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if not end or not status:
        return Answer("no response")
    if status != [b"200"]:
        return Answer(f"status {status[0].decode()}")
    events = _unchunked(body) if b"transfer-encoding: chunked" in head.lower() else body
    try:
        return _answer(events, output)
    except msgspec.DecodeError:
        return Answer("not events of a completion")


def _answer(events: bytes, output: int) -> Answer:
    lines = list(_lines(events))
    if _DONE not in lines:
        return Answer("cut")
    text, usage = [], Usage()
    for line in lines:
        if line != _DONE:
            event = _EVENT.decode(line)
            text += [choice.text for choice in event.choices]
            usage = event.usage or usage
    if usage.completion_tokens != output:
        return Answer(f"{usage.completion_tokens} of {output} tokens")
    details = usage.prompt_tokens_details or Details()
    return Answer("", "".join(text), usage.prompt_tokens, details.cached_tokens or 0, output)


def _lines(events: bytes) -> Iterator[bytes]:
    for line in events.split(b"\n"):
        if line.startswith(_PREFIX):
            yield line[len(_PREFIX) :].rstrip()


def _unchunked(body: bytes) -> bytes:
    """Return the content of chunks; of a body that was cut, the whole chunks."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        size = int(body[at:end].partition(b";")[0], 16) if end > at else 0
        if not size or end + 2 + size > len(body):
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size


_EVENT = msgspec.json.Decoder(Event)
