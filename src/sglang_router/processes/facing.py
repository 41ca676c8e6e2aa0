"""Between the records of routing and messages: requests, legs, answers, workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sglang_router.processes.messages import Answer, Ask, Ended, Known, OpenLeg, Unasked
from sglang_router.routing.endpoints import ENDPOINTS, UNKNOWN, UNKNOWN_READ, Endpoint
from sglang_router.routing.events import Answered, Finished
from sglang_router.routing.facts import Facts
from sglang_router.routing.imprint import Imprint
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag, Route, Target
from sglang_router.routing.usage import Usage

ROWS: Final[Sequence[Endpoint]] = (*ENDPOINTS.values(), UNKNOWN, UNKNOWN_READ)
PLACES: Final = {id(endpoint): place for place, endpoint in enumerate(ROWS)}
"""The place of each endpoint in ROWS."""
OUTCOMES: Final = tuple(Outcome)
_CODES: Final = {outcome: code for code, outcome in enumerate(OUTCOMES)}


def code_of(outcome: Outcome | None) -> int:
    """Return the index of an outcome in OUTCOMES; -1 for None."""
    return -1 if outcome is None else _CODES[outcome]


class TextForm(NamedTuple):
    """How the text of an ask crosses: inline, or as a place in shared memory; and the fingerprint of the body."""

    text: bytes | None
    at: int = 0
    length: int = 0
    digest: bytes = b""


def ask_of(tag: RequestTag, facts: Facts, now: float, shape: TextForm) -> Ask:
    """Return the question about a request."""
    endpoint, named = facts.endpoint, tag.named
    text, at, length, digest = shape
    method = path = ""
    if endpoint.route is None:
        method, path = tag.route.method, tag.route.path
    return Ask(
        tag.number,
        PLACES[id(endpoint)],
        now,
        tag.raw_id,
        tag.start,
        tag.peer,
        tag.client,
        tag.received,
        named[1],
        named[2],
        facts.model,
        facts.namespace,
        facts.scaffold,
        facts.streaming,
        text,
        at,
        length,
        method,
        path,
        digest,
        tag.explained,
        facts.session,
        facts.follows,
        facts.division,
        facts.sequences,
        named[5],
    )


def tag_of(ask: Ask, number: int) -> RequestTag:
    """Return the tag of a request that a relay asks for. number: the decider's."""
    endpoint = ROWS[ask.endpoint]
    route = endpoint.route or Route(ask.method, ask.path, endpoint.name)
    named = (ask.id, ask.key, ask.trace, None, ask.explained, ask.priority)
    tag = RequestTag(number, ask.id, ask.start, route, ask.peer, ask.client, ask.size, named)
    if ask.model:
        tag.model = ask.model.decode("utf-8", "replace")
    tag.streaming = ask.streaming
    return tag


def facts_of(ask: Ask, text: bytes) -> Facts:
    """Return the facts of a request that a relay asks for."""
    body = Imprint(ask.size, ask.digest)
    facts = Facts(ROWS[ask.endpoint], ask.namespace, text, ask.scaffold, ask.streaming, ask.model, ask.key, body)
    facts.session, facts.follows, facts.division = ask.session, ask.follows, ask.division
    facts.sequences = ask.sequences
    return facts


def answer_of(answer: Answered) -> Answer:
    """Return what became of a request as a message."""
    prompt, cached, completion = figures_of(answer.usage)
    return Answer(
        answer.status,
        answer.code,
        code_of(answer.outcome),
        answer.duration,
        answer.first_byte,
        answer.sent,
        answer.retries,
        answer.resumed,
        answer.unresumed,
        prompt,
        cached,
        completion,
        answer.handoff,
    )


def figures_of(usage: Usage | None) -> tuple[int, int, int]:
    """Return what an engine told as it crosses."""
    return (-1, -1, -1) if usage is None else (usage.prompt, usage.cached, usage.completion)


def usage_of(told: Answer | Ended) -> Usage | None:
    """Return what an engine told; None when that was nothing."""
    prompt, cached, completion = told.prompt, told.cached, told.completion
    return None if prompt < 0 and cached < 0 and completion < 0 else Usage(prompt, cached, completion)


def answered_of(answer: Answer) -> Answered:
    """Return what became of a request."""
    outcome = None if answer.outcome < 0 else OUTCOMES[answer.outcome]
    answered = Answered(
        answer.status,
        answer.code,
        outcome,
        answer.duration,
        answer.first_byte,
        answer.sent,
        answer.retries,
        answer.resumed,
        answer.unresumed,
        usage_of(answer),
    )
    answered.handoff = answer.handoff
    return answered


def open_leg(leg: PlannedLeg, began: bool = True, since: float = 0.0) -> OpenLeg:
    """Return a leg as a message to a decider that has not planned it."""
    target = leg.target
    return OpenLeg(leg.lease, target.name, target.worker_id, leg.branch, leg.matched, leg.total, began, since)


def unasked_of(event: Finished) -> Unasked:
    """Return the end of a request of which the decider never heard."""
    tag, route = event.tag, event.tag.route
    return Unasked(
        tag.raw_id,
        tag.start,
        route.method,
        route.path,
        route.endpoint,
        tag.peer,
        tag.client,
        tag.received,
        tag.named[1],
        tag.named[2],
        tag.model,
        tag.streaming,
        answer_of(event.answer),
        None if event.leg is None else open_leg(event.leg),
    )


def tag_unasked(told: Unasked, number: int) -> RequestTag:
    """Return the tag of such a request."""
    route = Route(told.method, told.path, told.endpoint)
    named = (told.id, told.key, told.trace, None, False, None)
    tag = RequestTag(number, told.id, told.start, route, told.peer, told.client, told.size, named)
    tag.model, tag.streaming = told.model, told.streaming
    return tag


def known_of(worker: int, target: Target) -> Known:
    """Return a worker's destination as a message."""
    return Known(worker, *target)


def target_of(known: Known) -> Target:
    """Return the destination of a worker."""
    return Target(known.url, known.rank, known.key, known.name, known.worker_id, known.role)
