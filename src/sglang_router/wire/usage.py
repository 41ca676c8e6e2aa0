"""Read how many tokens a request took from its answer, as far as the engine tells.

    {"id": ..., "choices": [...], "usage": {"prompt_tokens": 455, "prompt_tokens_details": {"cached_tokens": 454}, ...}}
                                  ^
                                  '-- found from the end: the rest from here on, with "{" before it, is JSON again

(A short answer is decoded as a whole: that is quicker.)

What was written by a model, or by a client, is not mistaken for it. A quote inside a text is escaped, so the mark that
is searched for (`"usage":`) is always the name of a member; and the rest of the answer is JSON again only if that is a
member of the answer itself, because one that lies deeper has too many closing braces behind it. Events of /v1/responses
and the first one of /v1/messages hold the answer as a member, so there one level more is looked at.

    answer          looked at                                    bytes
    JSON            its end, and only if that says nothing, its beginning
    events          the events that came last; of /v1/messages the first one as well: it tells the prompt
                    at most TAIL bytes of an end, and HEAD bytes of a beginning

Figures that cannot be are left out: see `wire.usage_forms`, and more cached tokens than the prompt has.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from sglang_router.wire.usage_forms import Spent, UsageForm

TAIL: Final = 8192
"""Bytes at the end of an answer that are looked at."""
SHORT_ANSWER: Final = 2048
"""Bytes of an answer, or of one event, that is decoded as a whole: that is quicker than to search."""
HEAD: Final = 4096
"""Bytes at its beginning that are looked at."""
SHORT: Final = 96
"""Bytes of a read up to which it is only the end of a stream, and holds no usage: the last event and the last chunk."""

Figures = tuple[int, int, int]
"""Tokens of the prompt, tokens of it that the engine had in its cache, tokens of the answer; -1: it does not tell."""

_MARKS: Final = (b'"usage":', b'"meta_info":', b'"timings":', b'"prompt_eval_count":')
_MOST_TRIES: Final = 4
"""Places where a mark is looked at; more are the work of somebody who wants to keep the router busy."""
_START: Final = b"message_start"
_INNER: Final = b'{"response":{'
_BORDER: Final = re.compile(rb"\r\n[0-9A-Fa-f]{1,15}(?:;[\t\x20-\x7e]*)?\r\n")
"""Between two chunks of the chunked coding. JSON texts have no bare CR, and between two members there is no number."""
_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_decode: Final = msgspec.json.Decoder(UsageForm).decode


def joined(last: bytes, data: bytes) -> bytes:
    """Return the end of an answer, as far as it is looked at, after another read."""
    return data if len(data) >= TAIL else last[-TAIL:] + data


def usage_of(first: bytes, last: bytes, streaming: bool) -> Figures | None:
    """Return what an answer tells; None when it tells nothing. Bytes may have the chunked coding.

    first      how the body began
    last       how it ended; of a stream, in whole events
    streaming  the client asked for a stream
    """
    form = None
    start, end = last.find(b"{"), last.rfind(b"}") + 1
    if 0 <= start < end <= start + SHORT_ANSWER and (
        streaming or start == 0 or last.startswith(b"\r\n", max(start - 2, 0))
    ):
        form = _read(last[start:end])  # the usual case: a short answer, or one event
    found = _at_end(last, streaming) if form is None else _figures(form)
    if streaming:
        if (found is None or found[1] < 0) and _START in first:
            found = _both(_message_start(_content(first[:HEAD])), found)
    elif found is None and len(first) > len(last):
        found = _at_beginning(first[:HEAD])
    return found


def _both(begun: Figures | None, ended: Figures | None) -> Figures | None:
    """Return the figures of two events: of the prompt those that came last, if any."""
    if begun is None or ended is None:
        return begun or ended
    of_prompt = begun if ended[0] < 0 or ended[1] < 0 <= begun[1] else ended
    return of_prompt[0], of_prompt[1], ended[2] if ended[2] >= 0 else begun[2]


def _message_start(data: bytes) -> Figures | None:
    """Return what the first event of /v1/messages tells."""
    at = data.find(_MARKS[0], max(data.find(_START), 0))
    form = _event_from(data, at) if at >= 0 else None
    return None if form is None else _figures(form)


def _content(data: bytes) -> bytes:
    """Return bytes of a body without the borders of its chunks."""
    return _BORDER.sub(b"", data) if b"\r" in data else data


def _at_end(data: bytes, streaming: bool) -> Figures | None:
    data = _content(data[-TAIL:])
    for mark in _MARKS:
        at = data.rfind(mark)
        tries = _MOST_TRIES
        while at >= 0 and tries:
            form = _event_from(data, at) if streaming else _read(b"{" + data[at:])
            if form is not None and (figures := _figures(form)) is not None:
                return figures
            tries -= 1
            at = data.rfind(mark, 0, at)
    return None


def _event_from(data: bytes, at: int) -> UsageForm | None:
    """Return what an event tells from there on; None when it is no member of the event, nor of the answer in it."""
    end = data.find(b"\n", at)
    rest = data[at:end] if end >= 0 else data[at:]
    form = _read(b"{" + rest) or _read(_INNER + rest)
    if form is None and b"\r" in rest:  # lines that end with CR alone
        return _event_from(rest.replace(b"\r", b"\n"), 0)
    return form


def _at_beginning(data: bytes) -> Figures | None:
    """Return what the beginning of a long answer tells."""
    if not data.startswith(b"{"):
        data = _content(b"\r\n" + data)
    for mark in _MARKS:
        start = data.find(mark)
        close = start
        while close >= 0 and data.count(b"}", start, close) < _MOST_TRIES:
            close = data.find(b"}", close + 1)
            said = _read(data[: close + 1] + b"}") if close >= 0 else None
            if said is not None and (figures := _figures(said)) is not None:
                return figures
    return None


def _read(text: bytes) -> UsageForm | None:
    try:
        return _decode(text)
    except _ERRORS:
        return None


# -- the figures -------------------------------------------------------------------------------------------------------


def _figures(form: UsageForm) -> Figures | None:
    """Return the figures that were told; None when there is none."""
    response = form.response
    if isinstance(response, UsageForm):
        form = response
    elif form.message is not None:
        if (counts := _of_counts(form)) is not None:
            return counts
        form = form.message
    spent, timings = form.usage, form.timings
    if spent is None:
        spent = form.meta_info
        if spent is None and timings is None:
            return _of_counts(form)
    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    if spent is not None:
        prompt, completion = spent.prompt_tokens, spent.completion_tokens
        if prompt is not None:
            details = spent.prompt_tokens_details
            cached = spent.cached_tokens if details is None else details.cached_tokens
        else:
            prompt, cached, completion = _of_input(spent)
    if timings is not None and cached is None:
        cached = timings.cache_n
        if prompt is None and cached is not None:
            prompt = cached + (timings.prompt_n or 0)
        if completion is None:
            completion = timings.predicted_n
    if prompt is None:
        prompt = -1
    if cached is None or cached > prompt:
        cached = -1
    if completion is None:
        completion = -1
    return None if prompt < 0 and completion < 0 else (prompt, cached, completion)


def _of_counts(form: UsageForm) -> Figures | None:
    """Return the figures of an answer of Ollama; None when there is none."""
    prompt, completion = form.prompt_eval_count, form.eval_count
    if prompt is None and completion is None:
        return None
    return -1 if prompt is None else prompt, -1, -1 if completion is None else completion


def _of_input(spent: Spent) -> tuple[int | None, int | None, int | None]:
    """Return the figures of an answer of /v1/responses or /v1/messages."""
    prompt, cached = spent.input_tokens, spent.cache_read_input_tokens
    if prompt is None:
        cached = None
    elif cached is not None:
        prompt += cached + (spent.cache_creation_input_tokens or 0)
    elif spent.input_tokens_details is not None:
        cached = spent.input_tokens_details.cached_tokens
    return prompt, cached, spent.completion_tokens if spent.output_tokens is None else spent.output_tokens
