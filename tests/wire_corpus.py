"""Raw HTTP messages with their expected verdicts, and two readers that read a message in any split.

A corpus file is read line by line. In it, `\\r`, `\\x00` and the like are bytes:

    # why these cases are here
    @ POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: {}\\r\\n\\r\\nhello    the message; {} is where the cases differ
    400 | +5                        verdict | case
    ok | 005 | POST / hello         verdict | case | what was understood
    431 | A: {66000 x b}            the text after the number and the x is repeated that often

Verdicts: `ok` (served), `more` (the message is not complete), or the status of the answer to a refused message.
Requests are understood as "METHOD PATH BODY, METHOD PATH BODY"; responses as "STATUS PAYLOAD", followed by `+N` where N
bytes come after the message and by `...` where the payload ends when the connection closes.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sglang_router.errors import RouterError, WorkerInvalid
from sglang_router.wire.framing import Framing
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Request, RequestParser
from sglang_router.wire.response import ResponseHead, framing_of, parse_head

CORPUS = Path(__file__).parent / "wire" / "corpus"
_REPEATED = re.compile(rb"\{(\d+) x ([^}]*)\}")
_MANY = 1500
"""Bytes of a message above which not every split is tried."""


class Case(NamedTuple):
    """One message of a corpus, and its expected result."""

    name: str
    raw: bytes
    verdict: str
    understood: str


def _bytes(text: str) -> bytes:
    plain = codecs.decode(text, "unicode_escape").encode("latin-1")
    return _REPEATED.sub(lambda match: match[2] * int(match[1]), plain)


def _cases(name: str) -> Iterator[Case]:
    template = "{}"
    for number, line in enumerate((CORPUS / name).read_text("ascii").splitlines(), 1):
        if line.startswith("@ "):
            template = line[2:]
        elif line and not line.startswith("#"):
            verdict, case, *rest = line.split(" | ")
            raw = _bytes(template).replace(b"{}", _bytes(case))
            yield Case(f"{number}: {case}", raw, verdict, _bytes("".join(rest)).decode("latin-1"))


def corpus(name: str) -> list[Case]:
    """Return the cases of a file, in their order."""
    return list(_cases(name))


def each_case(name: str) -> pytest.MarkDecorator:
    """Run a test with each `case` of a file."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in corpus(name)])


def pieces(raw: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Return the message as it arrives when reads end at `cuts`."""
    places = [0, *sorted(cuts), len(raw)]
    return [raw[start:end] for start, end in itertools.pairwise(places)]


def splits(raw: bytes) -> Iterator[list[bytes]]:
    """Yield the message whole; in two at each position; byte by byte.

    A long message is cut at each position near its start and its end, at some between, and into reads of 500 bytes.
    """
    size = len(raw)
    yield [raw]
    if size <= _MANY:
        places: Iterable[int] = range(1, size)
    else:
        places = (*range(1, 100), *range(100, size - 100, size // 7), *range(size - 100, size))
    for cut in places:
        yield [raw[:cut], raw[cut:]]
    yield pieces(raw, range(1, size) if size <= _MANY else range(500, size, 500))


# -- requests ----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a parser made of a client's bytes."""

    requests: list[Request]
    error: RouterError | None
    state: str
    """What the parser waits for: "head", "body", "continue", or "" between requests."""

    @property
    def verdict(self) -> str:
        if self.error is not None:
            return str(self.error.status)
        return "more" if self.state else "ok"

    @property
    def understood(self) -> str:
        return ", ".join(f"{r.method.decode()} {r.path.decode()} {r.body.decode()}".rstrip() for r in self.requests)


def read_requests(reads: Iterable[bytes], limits: Limits | None = None) -> Asked:
    """Feed the reads of one connection to a parser."""
    parser = RequestParser(limits or Limits())
    requests: list[Request] = []
    error: RouterError | None = None
    for data in reads:
        for item in parser.feed(data):
            assert error is None, "nothing follows an error"
            if isinstance(item, RouterError):
                error = item
            else:
                requests.append(item)
    waits = {"head": parser.mid_head, "body": parser.mid_body, "continue": parser.wants_continue}
    parser.close()
    return Asked(requests, error, " ".join(name for name, true in waits.items() if true))


# -- responses ---------------------------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """What a parser made of a worker's bytes."""

    head: ResponseHead | None = None
    interim: tuple[int, ...] = ()
    payload: bytes = b""
    end: int = -1
    """Where the message ends in all the bytes; -1 while it continues."""
    framing: Framing | None = None
    invalid: bool = False

    @property
    def verdict(self) -> str:
        if self.invalid:
            return "502"
        return "ok" if self.end >= 0 or (self.framing is not None and self.framing.ends_at_close) else "more"

    def understood(self, size: int) -> str:
        assert self.head is not None
        behind = "..." if self.end < 0 else f"+{size - self.end}" if size > self.end else ""
        return " ".join(
            part for part in (*map(str, self.interim), str(self.head.status), self.payload.decode(), behind) if part
        )


def read_response(reads: Iterable[bytes]) -> Answered:
    """Read one answer to a POST, as the upstream connection does; bytes after it are left alone."""
    answered, buffer, consumed = Answered(), b"", 0
    payload: list[bytes] = []
    try:
        for data in reads:
            if answered.framing is None:
                seen, buffer = len(buffer), buffer + data
                while (head := parse_head(buffer, seen)) is not None:
                    seen, consumed, buffer = 0, consumed + head.end, buffer[head.end :]
                    if head.status >= 200:
                        answered = answered._replace(head=head, framing=framing_of(head))
                        break
                    answered = answered._replace(interim=(*answered.interim, head.status))
                if answered.framing is None:
                    continue
                data = buffer
            assert answered.framing is not None
            end = answered.framing.feed(data, payload)
            if end >= 0:
                return answered._replace(payload=b"".join(payload), end=consumed + end)
            consumed += len(data)
    except WorkerInvalid:
        return Answered(invalid=True)
    return answered._replace(payload=b"".join(payload))
