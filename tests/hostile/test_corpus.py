"""The corpora of tests/wire over real sockets: what the client gets, and what reached the worker.

Whole, in two reads, and byte by byte. Before the next piece is sent, the router has certainly read the one before: it
has answered another client in between (`Arena.settle`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import pytest

from hostile.arena import Arena, Client, Leg, Lie, post
from wire_corpus import Case, corpus, pieces

REQUESTS = corpus("requests.txt")
RESPONSES = corpus("responses.txt")
_AT_ONCE = 100
_UNDERSTOOD = re.compile(r"(?:1\d\d )*(\d{3})(?: ([a-z]+))?(?: (?:\.\.\.|\+\d+))?")


def _whole(raw: bytes) -> list[bytes]:
    return [raw]


def _in_two(raw: bytes) -> list[bytes]:
    return pieces(raw, [len(raw) // 2])


def _bytewise(raw: bytes) -> list[bytes]:
    return pieces(raw, range(1, len(raw)))


def _some_short(cases: Sequence[Case], every: int) -> list[Case]:
    return [case for case in cases if len(case.raw) < 200][::every]


# -- what clients send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "cases"),
    [(_whole, REQUESTS), (_in_two, REQUESTS), (_bytewise, _some_short(REQUESTS, 7))],
    ids=["whole", "in two", "bytewise"],
)
def test_requests(field: Arena, cut: Callable[[bytes], list[bytes]], cases: Sequence[Case]) -> None:
    field.worker.asked.clear()
    with field.polite():
        for batch in _batches(cases):
            _send_batch(field, cut, batch)
            field.settle()
            for target, case in batch:
                entries = [entry for entry in case.understood.split(", ") if entry.startswith("POST /generate")]
                forwarded = [entry.removeprefix("POST /generate").removeprefix(" ").encode() for entry in entries]
                assert field.worker.bodies().get(target, []) == forwarded, case


def _batches(cases: Sequence[Case]) -> Iterator[list[tuple[str, Case]]]:
    """Return the cases, each with its own target, so that the worker can tell where a request came from.

    The router does not read the bodies of this endpoint.
    """
    for start in range(0, len(cases), _AT_ONCE):
        batch = cases[start : start + _AT_ONCE]
        yield [(f"/v1/audio/transcriptions?case={case.name.split(':')[0]}", case) for case in batch]


def _send_batch(field: Arena, cut: Callable[[bytes], list[bytes]], batch: list[tuple[str, Case]]) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(field.connect()) for _ in batch]
        reads = [cut(case.raw.replace(b"/generate", target.encode())) for target, case in batch]
        for step in range(max(map(len, reads))):
            for client, parts in zip(clients, reads, strict=True):
                if step < len(parts):
                    client.send(parts[step])
            field.settle()
        for client, (_, case) in zip(clients, batch, strict=True):
            _check_answers(client, case)


def _check_answers(client: Client, case: Case) -> None:
    ends = False
    for entry in filter(None, case.understood.split(", ")):
        answer = client.answer(entry.split(" ")[0])
        assert answer is not None, case
        assert answer.status < 500, (case, answer)
        assert answer.complete, (case, answer)
        ends = answer.headers.get("connection") == "close"
    if case.verdict.isdigit() and not ends:  # what follows a request that closes the connection gets no answer at all
        refusal = client.answer()
        assert refusal is not None, case
        assert str(refusal.status) == case.verdict, (case, refusal)
        assert refusal.headers["connection"] == "close", case
        assert refusal.code, case
        assert client.ended(), case


# -- what workers send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "cases"),
    [(_whole, RESPONSES), (_in_two, RESPONSES[::2]), (_bytewise, _some_short(RESPONSES, 40))],
    ids=["whole", "in two", "bytewise"],
)
def test_responses(field: Arena, cut: Callable[[bytes], list[bytes]], cases: Sequence[Case]) -> None:
    with field.polite():
        for case in cases:
            field.worker.lies["case"] = _drip(cut(case.raw))
            answer = field.ask(post("/generate?lie=case"))
            if case.verdict != "ok":
                assert answer.code in ("worker_invalid_response", "worker_broken") or not answer.complete, (
                    case,
                    answer,
                )
                continue
            match = _UNDERSTOOD.fullmatch(case.understood)
            assert match is not None, case
            assert answer.complete, (case, answer)
            assert (str(answer.status), answer.body.decode()) == match.groups(""), case


def _drip(reads: list[bytes]) -> Lie:
    async def lie(leg: Leg) -> None:
        for data in reads[:-1]:
            await leg.send(data)
            await leg.settle()
        await leg.send(reads[-1])
        leg.writer.close()
        await leg.hung_up()

    return lie
