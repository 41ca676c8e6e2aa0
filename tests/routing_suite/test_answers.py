"""What a client of a live run makes of the bytes that came."""

from __future__ import annotations

import pytest
from scripts.routing_suite.answers import Answer, read

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"index":0,"text":" word"}]}\n\n'
USAGE = b'"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}'
LAST = b'data: {"choices":[],' + USAGE + b"}\n\n"
DONE = b"data: [DONE]\n\n"


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


def test_text_and_tokens_of_a_whole_answer() -> None:
    whole = Answer("", " word word", prompt=9, cached=4, output=2)
    assert read(HEAD + chunked(TOKEN, TOKEN, LAST, DONE), 2) == whole
    assert read(HEAD + chunked(TOKEN[:7], TOKEN[7:] + TOKEN, LAST + DONE), 2) == whole, "chunks are not events"
    assert read(b"HTTP/1.1 200 OK\r\n\r\n" + TOKEN + TOKEN + LAST + DONE, 2) == whole, "without chunks"


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "no response"),
        (b"HTTP/1.1 200 OK\r\nContent-", "no response"),
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}", "status 429"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "status 503"),
        (HEAD, "cut"),
        (HEAD + chunked(TOKEN, TOKEN, LAST), "cut"),
        (HEAD + chunked(TOKEN, LAST, DONE)[:-30], "cut"),
        (HEAD + chunked(TOKEN, DONE), "0 of 2 tokens"),
        (HEAD + chunked(b"data: {\n\n", DONE), "not events of a completion"),
    ],
)
def test_everything_else_is_a_failure(raw: bytes, error: str) -> None:
    assert read(raw, 2) == Answer(error)
