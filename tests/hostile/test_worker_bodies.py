"""Bodies that do not describe a worker: POST /workers and PUT /workers/{id} refuse them with a reason, and return what
they do accept unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang_router.admin import shapes
from sglang_router.routing.rules import HealthRules
from stack import Reply, Stack, stack

DEEP = 100_000
URL = "http://127.0.0.1:9"
NEVER = HealthRules(interval=3600.0, timeout=0.001)

MALFORMED = {
    "nothing": b"",
    "white space": b" \r\n\t",
    "cut": b'{"url": "http://127.0.0.1:9"',
    "two objects": b'{"cost": 1}{}',
    "NUL behind it": b'{"cost": 1}\x00',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"cost": 1}'.encode("utf-16"),
    "100,000 arrays": b'{"x": %s%s}' % (b"[" * DEEP, b"]" * DEEP),
    "40,000 objects": b'{"x": %s1%s}' % (b'{"y":' * 40_000, b"}" * 40_000),
    "100,000 arrays without an end": b'{"x": ' + b"[" * DEEP,
    "2,000 arrays": b'{"x": %s%s}' % (b"[" * 2000, b"]" * 2000),
    "a field twice": b'{"cost": 1, "cost": 2}',
    "a field twice, written in two ways": b'{"cost": 1, "c\\u006fst": 2}',
    "a label twice": b'{"labels": {"a": "x", "a": "y"}}',
    "an unknown field twice": b'{"x": 1, "x": 1}',
    "a lone surrogate": b'{"model_id": "\\ud800"}',
    "a lone surrogate nobody reads": b'{"x": "\\ud800"}',
    "surrogates in the wrong order": b'{"model_id": "\\udc00\\ud800"}',
    "a surrogate as UTF-8": b'{"model_id": "\xed\xa0\x80"}',
    "invalid UTF-8": b'{"model_id": "\xff"}',
    "invalid UTF-8 nobody reads": b'{"x": "\xff"}',
    "an overlong slash": b'{"x": "\xc0\xaf"}',
    "a raw newline in a string": b'{"model_id": "a\nb"}',
    "NaN": b'{"cost": NaN}',
    "NaN nobody reads": b'{"x": NaN}',
    "infinity": b'{"cost": -Infinity}',
    "a number of 100,000 digits nobody reads": b'{"x": %s}' % (b"9" * DEEP),
    "an octal number": b'{"priority": 007}',
}
UNFIT = {
    "a megabyte": b'{"x": "%s"}' % (b"x" * 1_000_000),
    "an array": b"[]",
    "null": b"null",
    "a string": b'"url"',
    "a number too large": b'{"cost": 1e999}',
    "a number of 100,000 digits": b'{"priority": %s}' % (b"9" * DEEP),
    "a priority of 65 bits": b'{"priority": 18446744073709551616}',
    "a priority that is none": b'{"priority": 1.5}',
    "a cost that is a string": b'{"cost": "1"}',
    "true for a number": b'{"priority": true}',
    "labels that are no strings": b'{"labels": {"a": 1}}',
    "labels that are a list": b'{"labels": [["a", "b"]]}',
    "a key with a line break": b'{"api_key": "a\\r\\nx: y"}',
    "a key with NUL": b'{"api_key": "\\u0000"}',
    "no time at all": b'{"health_check_timeout_secs": 0}',
    "a negative time": b'{"health_check_interval_secs": -1}',
    "a threshold of nothing": b'{"health_failure_threshold": 0}',
}


@pytest.fixture(scope="module")
def router() -> Iterator[Stack]:
    """One worker, at an address where nothing listens."""
    with stack(health=NEVER) as router:
        router.add(URL)
        yield router


def refused(reply: Reply, *statuses: int) -> dict[str, Any]:
    """Check for an error of the router's format and reasonable length that is not an error of the router itself."""
    assert reply.status in statuses, (reply.status, reply.body[:300])
    error = msgspec.json.decode(reply.body, type=shapes.Error).error
    assert reply.headers["x-smg-error-code"] == error.code
    assert 10 < len(error.message) < 4000
    return msgspec.structs.asdict(error)


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_json_is_refused(router: Stack, body: bytes) -> None:
    name = router.worker(URL).id
    with_url = body.replace(b"{", b'{"url": "http://127.0.0.1:8", ', 1) if body.startswith(b'{"') else body
    for reply in (router.post("/workers", with_url), router.ask("PUT", f"/workers/{name}", body)):
        assert refused(reply, 400)["code"] == "json_parse_error"
    assert len(router.fleet) == 1


@pytest.mark.parametrize("body", UNFIT.values(), ids=UNFIT.keys())
def test_what_describes_no_worker_is_refused(router: Stack, body: bytes) -> None:
    name = router.worker(URL).id
    with_url = body.replace(b"{", b'{"url": "http://127.0.0.1:8", ', 1) if body.startswith(b'{"') else body
    for reply in (router.post("/workers", with_url), router.ask("PUT", f"/workers/{name}", body)):
        assert refused(reply, 422)["code"] == "unprocessable"
    assert len(router.fleet) == 1


@pytest.mark.parametrize("url", ["http://" + "a" * 3000, "", "ftp://x", "//x", "http://\x00", "http://é"])
def test_what_is_no_url_is_refused(router: Stack, url: str) -> None:
    refused(router.post("/workers", {"url": url}), 400, 422)
    assert len(router.fleet) == 1


# -- anything ----------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(["0", "-0", "1e400", "-1e-400", "9" * 30, "NaN", "Infinity", "1.0", "2147483648", "01"])
STRINGS = st.text(max_size=20).map(json.dumps) | st.sampled_from(
    ['"\\ud800"', '"\\u0000"', '"\ud800"', "'x'", '"http://x"']
)
VALUES = st.recursive(
    st.sampled_from(["null", "true", ""]) | NUMBERS | STRINGS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
        | st.lists(st.tuples(STRINGS, inner), max_size=3).map(
            lambda pairs: f"{{{','.join(f'{n}:{v}' for n, v in pairs)}}}"
        )
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(["url", "api_key", "model_id", "priority", "cost", "labels", "health_check_timeout_secs", "x"])
BODIES = st.lists(st.tuples(FIELDS, VALUES), max_size=4).map(
    lambda fields: f"{{{','.join(f'{json.dumps(name)}:{value}' for name, value in fields)}}}".encode(
        errors="surrogatepass"
    )
)


@example(body=b'{"cost":999999999999999999999999999999}')
@given(body=BODIES | st.binary(max_size=60))
def test_whatever_is_sent_is_refused_or_kept(router: Stack, body: bytes) -> None:
    name = router.worker(URL).id
    reply = router.ask("PUT", f"/workers/{name}", body)
    if reply.status != 202:
        refused(reply, 400, 422)
        return
    said = json.loads(body)  # a strict reader accepts it too
    shown = msgspec.json.decode(router.get(f"/workers/{name}").body, type=shapes.WorkerState)
    if said.get("model_id"):
        assert shown.model_id == said["model_id"]
    if said.get("labels") is not None:
        assert shown.metadata == said["labels"]
    if said.get("cost") is not None:
        assert shown.cost == float(said["cost"])  # a cost is a float, also when it is written as a long integer


HERE = ("127.0.0.1:9", "127.0.0.2:7", "LOCALHOST:9", "[::1]:9", "127.0.0.1:09")
"""Ports of this machine where nothing listens: a worker that is registered gets health checks."""
URLS = st.builds(
    "{}{}{}".format,
    st.sampled_from(
        ["http://", "HTTPS://", "http:", "//", "grpc://", " http://", "http://u:p@", "http:///", "h\x00tp://"]
    ),
    st.sampled_from(HERE),
    st.sampled_from(["", "/", "/a/b//", "?x", "#", ":1", "@0", "\n", "/\u00e9", "/%2e%2e", "/;", "\\", "0000"]),
)


@given(url=URLS)
def test_any_url_is_refused_or_registered_once(router: Stack, url: str) -> None:
    reply = router.post("/workers", {"url": url})
    if reply.status != 202:
        refused(reply, 400, 409)
        return
    named = reply.json()["worker_id"]
    assert refused(router.post("/workers", {"url": url}), 409)["code"] == "conflict"
    assert router.get(f"/workers/{named}").json()["url"] == reply.json()["url"] == url.strip().rstrip("/").lower()
    assert router.ask("DELETE", f"/workers/{named}").status == 202
