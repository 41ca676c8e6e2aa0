"""The page of a router as users start it: its stream in one process and in several, its events, and its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from engines import engine_processes
from routers import WITHIN, RouterProcess, router_process


@contextlib.contextmanager
def frames(router: RouterProcess) -> Iterator[Iterator[dict[str, Any]]]:
    """Yield the data of the stream's events."""
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=WITHIN)
    with contextlib.closing(connection):
        connection.request("GET", "/overview", headers={"accept": "text/event-stream"})
        answer = connection.getresponse()
        assert answer.status == 200
        yield (json.loads(line[6:]) for line in answer if line.startswith(b"data: "))


@pytest.mark.parametrize("flags", [(), ("--relay-processes", "2")], ids=["one process", "relays"])
def test_the_stream_follows_the_router_and_ends_with_it(flags: tuple[str, ...]) -> None:
    with engine_processes(1, "--speed", "0") as (url,), router_process([url], *flags) as router:
        assert b"<title>sglang-router</title>" in router.get("/", accept="text/html").body
        with frames(router) as told:
            assert next(told)["changes"]
            first = next(told)
            assert [row[1] for row in first["rows"]] == [url]
            assert router.post("/v1/completions", {"prompt": "hello", "max_tokens": 4}).status == 200
            assert any(frame["decisions"] for frame in told if not frame["whole"])
            router.send_signal(signal.SIGHUP)
            assert any(event["what"] == "reload" for frame in told for event in frame["events"])
            router.end()  # within seconds, although the stream was open
            for _ in told:
                pass


def test_scaling_and_shadow_policy_are_told() -> None:
    flags = ("--autoscale", "1:4", "--shadow-policy", "random")
    with engine_processes(1, "--speed", "0") as (url,), router_process([url], *flags) as router:
        assert router.post("/v1/completions", {"prompt": "hello", "max_tokens": 4}).status == 200
        told = router.get("/overview").json()
    assert (told["scale"]["rules"]["fewest"], told["scale"]["rules"]["most"]) == (1, 4)
    assert told["shadow"] | {"matched": 0, "actual_matched": 0} == {
        "policy": "random",
        "agreed": 1,
        "differed": 0,
        "matched": 0,
        "actual_matched": 0,
    }
    assert told["rolling"] is None
