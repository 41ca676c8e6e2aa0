"""Stored responses and conversations: requests about them go to the worker that keeps them, or find it."""

from __future__ import annotations

import pytest

from fleets import Attempt, Bench, facts
from sglang_router.errors import ModelRequired
from sglang_router.relay.answered_ids import object_id, response_id
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import Facts, read
from sglang_router.routing.kept_ids import KeptIds
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.queue import ROOM
from sglang_router.routing.rules import FleetRules
from sglang_router.routing.spec import WorkerSpec

RESPONSES, STORED = ENDPOINTS[b"/v1/responses"], ENDPOINTS[b"/v1/responses/{id}"]


def about(id: bytes) -> Facts:
    found = Facts(STORED)
    found.follows = id
    return found


def create(previous: bytes = b"") -> Facts:
    return read(RESPONSES, b'{"input":"hi","previous_response_id":"%b"}' % previous if previous else b'{"input":"hi"}')


def hold(b: Bench, request: Facts) -> Attempt:
    return b.ask(request).attempt


def served(b: Bench, id: bytes) -> Attempt:
    """Create a response with this id."""
    attempt = hold(b, create())
    b.router.holds(attempt.leg, id)
    attempt.end()
    return attempt


@pytest.mark.parametrize(
    ("body", "id"),
    [
        (b'{"input":"x","previous_response_id":"resp_1","conversation":"conv_1"}', b"resp_1"),
        (b'{"input":"x","previous_response_id":null,"conversation":{"id":"conv_1"}}', b"conv_1"),
        (b'{"input":"x","conversation":"conv_1"}', b"conv_1"),
        (b'{"input":"x","previous_response_id":"","conversation":[]}', b""),
        (b'{"input":"x"}', b""),
    ],
)
def test_what_a_response_continues_is_read_from_its_body(body: bytes, id: bytes) -> None:
    assert read(RESPONSES, body).follows == id


def test_other_endpoints_continue_nothing() -> None:
    assert read(ENDPOINTS[b"/v1/chat/completions"], b'{"previous_response_id":"resp_1"}').follows == b""


def test_a_long_id_is_kept_as_its_digest() -> None:
    found = read(RESPONSES, b'{"previous_response_id":"%b"}' % (b"r" * 500)).follows
    assert 0 < len(found) <= 64


def test_requests_about_a_response_go_where_it_is_kept() -> None:
    b = Bench(4, "round_robin")
    homes = {n: served(b, b"resp_%d" % n).worker for n in range(8)}
    for n, home in homes.items():
        for request in (about(b"resp_%d" % n), create(b"resp_%d" % n)):
            attempt = hold(b, request)
            assert (attempt.worker, attempt.branch) == (home, "holder")
            attempt.end()


def test_a_conversation_stays_where_it_began() -> None:
    b = Bench(3, "round_robin")
    conversation = read(RESPONSES, b'{"input":"x","conversation":"conv_1"}')
    first = b.send(conversation)
    assert first.branch == "turn"
    assert {b.send(conversation).worker for _ in range(5)} == {first.worker}


def test_a_draining_worker_is_asked_about_what_it_keeps_but_continues_nothing() -> None:
    b = Bench(3, "round_robin")
    home = served(b, b"resp_1").worker
    b.fleet.set_draining(home, True)
    assert hold(b, about(b"resp_1")).worker is home
    assert hold(b, create(b"resp_1")).worker is not home


def test_a_response_that_nobody_knows_is_looked_for_at_each_worker_once() -> None:
    b = Bench(9, "round_robin")
    attempt: Attempt | None = hold(b, about(b"resp_1"))
    asked = []
    while attempt is not None:
        asked.append(attempt.worker)
        attempt = attempt.retry(Outcome.REJECTED, status=404)
    assert sorted(worker.url for worker in asked) == [worker.url for worker in b.workers]
    assert b.router.leases == 0
    assert all(worker.load == 0 for worker in b.workers)
    assert not any(worker.circuit.failures for worker in b.workers)


def test_who_answers_is_remembered() -> None:
    b = Bench(5, "round_robin")
    first = hold(b, about(b"resp_1"))
    second = first.retry(Outcome.REJECTED, status=404)
    assert second is not None
    second.end()
    again = hold(b, about(b"resp_1"))
    assert (again.worker, again.branch) == (second.worker, "holder")
    assert again.retry(Outcome.REJECTED, status=404) is None, "it was deleted: nobody else has it"


def test_only_a_404_is_asked_on() -> None:
    b = Bench(3, "round_robin")
    assert hold(b, about(b"resp_1")).retry(Outcome.REJECTED, status=400) is None
    assert hold(b, facts(b"x")).retry(Outcome.REJECTED, status=404) is None
    assert hold(b, create(b"resp_1")).retry(Outcome.REJECTED, status=404) is not None


def test_a_holder_that_fails_is_asked_again_and_nobody_else() -> None:
    b = Bench(3, "round_robin")
    home = served(b, b"resp_1").worker
    again = hold(b, about(b"resp_1")).retry(Outcome.FAILED, status=500)
    assert again is not None
    assert again.worker is home
    assert again.delay > 0


def test_another_process_in_its_place_keeps_nothing() -> None:
    b = Bench(2, "round_robin", checked=True)
    for worker in b.workers:
        b.fleet.probed(worker, None, 0.0)
    home = served(b, b"resp_1").worker
    b.fleet.lost(home, 1.0)
    assert hold(b, about(b"resp_1")).branch == "turn"


def test_with_several_models_a_response_is_found_whatever_its_model() -> None:
    b = Bench(0, "round_robin", assign=None)
    for name in ("a", "a", "b"):
        number = len(b.fleet)
        b.workers.append(b.fleet.add(WorkerSpec(url=f"http://w{number}:1", model_id=name), 0.0))
        b.fleet.probed(b.workers[-1], None, 0.0)
    with pytest.raises(ModelRequired):
        b.ask(create())
    attempt: Attempt | None = hold(b, about(b"resp_1"))
    asked = set()
    while attempt is not None and attempt.worker is not b.workers[2]:
        asked.add(attempt.worker)
        attempt = attempt.retry(Outcome.REJECTED, status=404)
    assert attempt is not None, "the worker of the other model was asked"
    attempt.end()
    assert hold(b, about(b"resp_1")).worker is b.workers[2]
    for worker in b.workers[:2]:
        b.fleet.down(worker, "gone")
    assert hold(b, about(b"resp_2")).worker is b.workers[2], "the first model has no worker now"


def test_what_is_remembered_is_bounded() -> None:
    b = Bench(1)
    kept = KeptIds(most=3)
    for n in range(5):
        kept.keep(b"%d" % n, b.workers[0])
    assert [kept.holder(b"%d" % n) is not None for n in range(5)] == [False, False, True, True, True]
    kept.keep(b"2", b.workers[0])
    kept.keep(b"5", b.workers[0])
    assert kept.holder(b"2") is not None
    b.fleet.remove(b.workers[0])
    assert kept.holder(b"2") is None
    assert repr(kept) == "<KeptIds 2 ids>"


@pytest.mark.parametrize(
    ("answer", "id"),
    [
        (b'{"id":"resp_1f","object":"response"}', b"resp_1f"),
        (b'{ "object": "response", "id" : "resp_1f"}', b"resp_1f"),
        (b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_1f"}}\n\n', b"resp_1f"),
        (b'c\r\n{"id":"resp_1\r\n2\r\nf"', b""),
        (b'{"output":[{"id":"msg_1"}],"id":"resp_1f"}', b"resp_1f"),
        (b'{"id":"chatcmpl-1"}', b""),
        (b'{"pad":"' + b"x" * 5000 + b'","id":"resp_1"}', b""),
        (b"", b""),
    ],
)
def test_the_id_is_found_at_the_beginning_of_an_answer(answer: bytes, id: bytes) -> None:
    assert response_id(answer) == id


@pytest.mark.parametrize(
    ("answer", "id"),
    [
        (b'{"id":"file-1","object":"file","filename":"a {"}', b"file-1"),
        (b'{"object": "batch", "n": 1, "id" : "backend:9~x", "metadata": {"id": "other"}}', b"backend:9~x"),
        (b'2c\r\n{"id":"conv_7","metadata":{}}\r\n0\r\n\r\n', b"conv_7"),
        (b'{"metadata":{"id":"file-1"},"id":"file-2"}', b""),
        (b'{"x":["id"],"id":"file-1"}', b""),
        (b'{"filename":"\\"id\\": \\"file-1\\"","object":"file"}', b""),
        (b'[{"id":"file-1"}]', b""),
        (b'"id":"file-1"', b""),
        (b'{"id":"a/b"}', b""),
        (b'{"id":7}', b""),
        (b'{"pad":"' + b"x" * 5000 + b'","id":"file-1"}', b""),
        (b"", b""),
    ],
)
def test_an_id_that_a_client_could_have_written_is_not_taken_for_the_engines(answer: bytes, id: bytes) -> None:
    assert object_id(answer) == id


def test_a_search_goes_on_behind_a_worker_that_is_gone() -> None:
    b = Bench(12, "round_robin")
    attempt: Attempt | None = hold(b, about(b"resp_1"))
    asked = []
    for number in range(12):
        assert attempt is not None, f"{number} workers were asked of 12"
        asked.append(attempt.worker)
        attempt = attempt.retry(Outcome.REFUSED) if number % 3 == 2 else attempt.retry(Outcome.REJECTED, status=404)
    assert len(set(asked)) == 12


def test_a_search_goes_on_in_the_pool_of_another_model_behind_a_worker_that_is_gone() -> None:
    b = Bench(0, "round_robin", assign=None)
    for name in ("a", "b"):
        b.workers.append(b.fleet.add(WorkerSpec(url=f"http://{name}:1", model_id=name), 0.0))
        b.fleet.probed(b.workers[-1], None, 0.0)
    first = hold(b, about(b"resp_1"))
    second = first.retry(Outcome.UNCONNECTED)
    assert second is not None
    assert {first.worker, second.worker} == set(b.workers)


def test_what_continues_a_response_waits_for_its_full_holder() -> None:
    b = Bench(2, "round_robin", rules=FleetRules(most_load=1))
    first = hold(b, create())
    b.router.holds(first.leg, b"resp_1")
    waiting = b.ask(create(b"resp_1"))
    assert waiting.waits == (ROOM, 60.0)
    other = b.ask(create())
    assert other.waits is None, "nobody else waits behind it"
    other.attempt.end(now=1.0)
    b.settle(1.0)
    assert waiting.waits == (ROOM, 60.0)
    first.end(now=2.0)
    b.settle(2.0)
    assert (waiting.attempt.worker, waiting.attempt.branch) == (first.worker, "holder")


def test_a_holder_that_is_full_for_too_long_is_a_timeout() -> None:
    b = Bench(2, "round_robin", rules=FleetRules(most_load=1))
    first = hold(b, create())
    b.router.holds(first.leg, b"resp_1")
    assert b.router.expired(b.ask(create(b"resp_1")).tag, 60.0).code == "queue_timeout"
    assert len(b.router.queue) == 0


@pytest.mark.parametrize(("outcome", "status"), [(Outcome.BUSY, 429), (Outcome.FAILED, 500)])
def test_a_holder_that_answers_with_an_error_is_not_replaced_by_a_worker_that_knows_nothing(
    outcome: Outcome, status: int
) -> None:
    b = Bench(3, "round_robin")
    home = served(b, b"resp_1").worker
    again = hold(b, create(b"resp_1")).retry(outcome, status=status)
    assert again is None or again.worker is home
    assert (again is None) == (outcome is Outcome.BUSY), "who is busy is not asked again"
