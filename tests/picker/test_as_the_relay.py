"""What is told of a request is the same, whoever relayed it: the router itself, or a gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from fake_worker import FakeWorker, answer
from gateways import Scene, scene
from sglang_router.routing.events import Finished

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
TEXT = {"choices": [{"text": "a"}]}
STARTED = {"type": "message_start", "message": {"usage": {"input_tokens": 7, "cache_read_input_tokens": 2}}}
DELTA = {"type": "content_block_delta", "text": "y" * 900}
ENDED = {"type": "message_delta", "usage": {"output_tokens": 5}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}


class Case(NamedTuple):
    """An answer of a worker."""

    kind: str
    body: bytes
    path: str = "/v1/completions"
    status: int = 200


def said(path: str, *data: Any) -> Case:
    """Return an answer that is a stream of events."""
    return Case("text/event-stream", b"".join(b"data: %b\n\n" % json.dumps(each).encode() for each in data), path)


def lines(*data: Any) -> Case:
    return Case("application/x-ndjson", b"".join(json.dumps(each).encode() + b"\n" for each in data), "/api/generate")


def failed(code: int) -> Case:
    """Return a stream whose first event, after a comment, is an error."""
    case = said("/v1/completions", {"error": {"message": "no", "code": code}})
    return case._replace(body=b": hi\n\n" + case.body)


CASES = {
    "json": Case("application/json", json.dumps({"id": "1", "usage": USAGE}).encode()),
    "stream": said("/v1/completions", TEXT, {"choices": [], "usage": USAGE}),
    "messages": said("/v1/messages", STARTED, *[DELTA] * 12, ENDED),
    "lines": lines({"response": "a"}, {"done": True, "prompt_eval_count": 9, "eval_count": 3}),
    "nothing": Case("text/plain", b""),
    **{f"status {each}": Case("text/plain", b"no", status=each) for each in (400, 404, 429, 500, 503, 529)},
    **{f"first event {each}": failed(each) for each in (400, 429, 500, 503)},
    "first event of messages": said("/v1/messages", OVERLOADED),
    "first event of an unknown kind": said("/v1/completions", {"error": {"message": "no"}}),
    "first line": lines({"error": "no"}),
}
ASKED = {
    "/v1/completions": {"prompt": "x", "stream": True},
    "/v1/messages": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], "stream": True},
    "/api/generate": {"model": "m", "prompt": "x"},
}


def told(end: Finished) -> dict[str, Any]:
    usage = end.answer.usage
    return {
        "outcome": end.answer.outcome,
        "usage": usage and (usage.prompt, usage.cached, usage.completion),
        "model": end.tag.model,
        "route": repr(end.tag.route),
        "received": end.tag.received,
        "began": end.answer.first_byte >= 0.0,
    }


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Scene, FakeWorker]]:
    options = {"disable_retries": True, "disable_circuit_breaker": True, "disable_outlier_ejection": True}
    with scene(workers=0, options=options) as here:
        fake = here.router.fake({})
        here.router.add(fake.url)
        here.router.until_healthy(fake.url)
        yield here, fake


@pytest.mark.parametrize("size", [1 << 20, 100])
@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_read_alike_also_in_pieces(both: tuple[Scene, FakeWorker], name: str, size: int) -> None:
    here, fake = both
    case, before = CASES[name], len(here.ends.seen)
    fake.script[f"POST {case.path}"] = answer(case.status, case.body, case.kind)
    request = json.dumps(ASKED[case.path]).encode()
    here.router.ask("POST", case.path, request)
    relayed = told(here.ended(before + 1))
    asked = here.gateway.ask(case.path, request)
    asked.choice()
    asked.given_back()
    pieces = [case.body[at : at + size] for at in range(0, len(case.body), size)]
    asked.answer(case.status, *pieces, content_type=case.kind)
    assert told(here.ended(before + 2)) == relayed
