"""Bodies that are invalid JSON, or valid JSON with invalid content: they are served unchanged or refused, never a 5xx.

What the router reads of a body must not be misled, and it passes on the client's bytes, not its own reading of them.
The engines are the built-in ones: real processes with a parser of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines import engine_processes
from hostile.arena import Arena, post
from routers import RouterProcess, router_process

DEEP = 100_000
BODIES = {
    "100,000 arrays": b"[" * DEEP + b"]" * DEEP,
    "100,000 arrays in a field": b'{"text": %s}' % (b"[" * DEEP + b"]" * DEEP),
    "100,000 objects in a field nobody knows": b'{"text": "x", "y": %s1%s}' % (b'{"z":' * DEEP, b"}" * DEEP),
    "100,000 arrays without an end": b'{"messages": ' + b"[" * DEEP,
    "a field twice": b'{"text": "a", "text": "b", "model": "m", "model": 1}',
    "a field 10,000 times": b'{"text": "x"%s}' % (b', "stream": true' * 10_000),
    "a lone surrogate": b'{"text": "\\ud800", "model": "\\udfff"}',
    "surrogates in the wrong order": b'{"text": "\\udc00\\ud800"}',
    "invalid UTF-8": b'{"text": "\xff\xfe\xc0\x80"}',
    "invalid UTF-8 in a name": b'{"\xff": 1, "text": "x"}',
    "a surrogate in UTF-8": b'{"text": "\xed\xa0\x80"}',
    "UTF-16": '{"text": "x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"text": "x"}',
    "NaN": b'{"text": "x", "sampling_params": {"temperature": NaN}}',
    "NaN as the text": b'{"text": NaN}',
    "infinity": b'{"text": "x", "sampling_params": {"temperature": -Infinity, "top_p": 1e999}}',
    "a number of 100,000 digits": b'{"text": "x", "n": %s}' % (b"9" * DEEP),
    "NUL": b'{"text": "a\\u0000b"}\x00',
    "no object": b'"text"',
    "null": b"null",
    "nothing": b"",
    "white space": b" \r\n\t " * 1000,
    "cut": b'{"text": "x',
    "two objects": b'{"text": "x"}{"text": "y"}',
    "messages is a string": b'{"model": "m", "messages": "hello"}',
    "messages is an object": b'{"model": "m", "messages": {"role": "user"}}',
    "messages is a number": b'{"model": "m", "messages": 7}',
    "messages holds anything": b'{"model": "m", "messages": [1, null, [], {"role": 3, "content": {"x": []}}]}',
    "model is a list": b'{"model": ["m"], "text": "x", "messages": [], "prompt": "x"}',
    "model is long": b'{"model": "%s", "text": "x"}' % (b"m" * DEEP),
    "stream is a string": b'{"text": "x", "stream": "true"}',
    "huge token ids": b'{"input_ids": [%s1]}' % (b"9" * 30 + b", "),
    "negative counts": b'{"text": "x", "sampling_params": {"max_new_tokens": -1, "n": -5}}',
    "a huge string": b'{"text": "%s"}' % (b"x" * 500_000),
}
PATHS = ("/generate", "/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@pytest.fixture(scope="module")
def before_engines() -> Iterator[RouterProcess]:
    with engine_processes(1, "--speed", "0") as urls, router_process(urls, "--disable-access-log") as router:
        yield router


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_no_server_error(before_engines: RouterProcess, body: bytes) -> None:
    for path in PATHS:
        answer = before_engines.post(path, body)
        assert answer.status < 500, (path, answer.status, answer.body[:300])


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_what_reaches_the_worker_is_what_was_sent(field: Arena, body: bytes) -> None:
    field.worker.asked.clear()
    with field.polite():
        answer = field.ask(post("/v1/chat/completions", body))
    got = [asked for asked in list(field.worker.asked) if asked.target == "/v1/chat/completions"]
    assert answer.code in ("", "json_parse_error")
    assert answer.status == (400 if answer.code else 200)
    assert [asked.size for asked in got] == ([] if answer.code else [len(body)])
    assert [asked.body for asked in got if asked.body] == ([body] if got and len(body) <= 65536 and body else [])


def test_same_bodies_for_the_control_plane(field: Arena) -> None:
    """None of these bodies describes a worker to add, and none may be accepted as one."""
    before = len(field.router.workers())
    with field.polite():
        for name, body in BODIES.items():
            for path in ("/workers", "/add_worker?url=%00", "/flush_cache?x=%ff", "/nowhere"):
                answer = field.router.post(path, body)
                assert answer.status < 500 or answer.status == 501, (name, path, answer)
    assert len(field.router.workers()) == before
