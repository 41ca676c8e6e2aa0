"""Keep the last decisions, each with what came of it: for `GET /decisions`, `sglang-router explain` and the log file.

    Router._plan  --> decided    notes the table of the candidates, of some requests only
    listeners     --> retried    how an attempt ended that another one follows
                      finished   the record of a request, which is kept
    admin         --> ended, latest, running
    log file      <-- sink       each record, with the request's text to be hashed

Every ended request leaves a record: that costs a quarter of a microsecond, because everything in it is known at the
end (docs/decisions/0012-decision-records.md). What a policy saw of each candidate is known only at the moment of the
decision, and costs several: so it is noted for a request that asks (header x-sglang-router-explain), for each retry,
for one request of `every`, and where a shadow policy would have chosen another worker.

A policy that fails to explain itself hurts no request: no tables are made from then on, and `failed` hears why.

The records are bounded by number, and so are the lines of all their tables together. The oldest go first: a record
may lose its tables before it goes, but never the newest one that has some.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from sglang_router.routing.assignment import HOLDER
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.considered import Considered
from sglang_router.routing.decision_record import DecisionAttempt, DecisionRecord
from sglang_router.routing.events import Finished, Listener, Retried
from sglang_router.routing.excluded import reason
from sglang_router.routing.facts import Facts
from sglang_router.routing.lease import Lease
from sglang_router.routing.model_names import plain_name
from sglang_router.routing.models import Serving
from sglang_router.routing.plan import PlannedLeg, RequestTag
from sglang_router.routing.policies.base import Choice
from sglang_router.routing.roles import DECODE, PREFILL
from sglang_router.routing.trail import Trail
from sglang_router.routing.usage import Usage

MOST_CONSIDERED: Final = 32
"""Lines of a table."""
LINES_PER_RECORD: Final = 4
"""Lines of tables that are kept, for each record that is kept."""
MOST_RUNNING: Final = 500
"""Requests in flight that are shown."""
_MOST_NOTED: Final = 4096
"""Requests in flight whose tables are kept."""
_LONGEST_SESSION: Final = 64
_NEVER: Final = 1 << 62
Sink = Callable[[DecisionRecord, str, bytes, bytes], None]
_NO_TEXT: Final = (b"", b"")
_NO_NUMBERS: Final[frozenset[int]] = frozenset()
_UNROUTED: Final = "unrouted"
_RUNNING: Final = "running"


class Recorder(Listener):
    """See the module.

    most       records that are kept
    every      one request of so many gets a table; 0: only those that must
    most_load  requests in flight that one worker may have; 0: no limit
    policy     what the usual policy is called
    epoch      returns what must be added to a time of the router's clock to get seconds since 1970
    failed     takes the fault of a policy that cannot explain itself
    policy_of  tells the policy by which a worker is chosen, "" for the usual one; None: all are chosen by that
    sink       takes the record of each ended request, its whole session, its namespace and routing text; None: nobody
    """

    def __init__(
        self,
        policy: str,
        most: int,
        every: int,
        most_load: int,
        epoch: Callable[[], float],
        failed: Callable[[Exception], None],
    ) -> None:
        self.most = most
        self.sink: Sink | None = None
        self.policy_of: Callable[[str], str] | None = None
        self.policy = policy
        self._every = every or _NEVER
        self.most_load = most_load
        self._epoch = epoch
        self._fault = failed
        self._explains = True  # the policy has not failed to
        self._records: deque[DecisionRecord] = deque()
        self._tabled: deque[DecisionRecord] = deque()  # those of them that have tables
        self._lines = 0  # of these tables
        self._noted: dict[int, list[DecisionAttempt]] = {}  # by number of the request, until it ends
        self._texts: dict[int, tuple[bytes, bytes]] = {}  # namespace and text, until the request ends; for the sink
        self._failed: dict[int, list[str]] = {}  # by number of the request: outcomes of the attempts that were retried

    def __repr__(self) -> str:
        return f"<Recorder {len(self._records)} records, {self._lines} lines, {len(self._noted)} noted>"

    def __len__(self) -> int:
        return len(self._records)

    # -- at the decision -----------------------------------------------------------------------------------------------

    def decided(
        self,
        tag: RequestTag,
        facts: Facts,
        pool: Serving,
        candidates: Candidates,
        choice: Choice,
        trail: Trail | None,
        now: float,
    ) -> None:
        """Note what there was to choose from, if that is wanted. Call it before the policy learns of its choice."""
        number, shadow = tag.number, choice.shadow
        if self.sink is not None and trail is None:
            self._texts[number] = (facts.namespace, facts.text)
        differs = shadow is not None and shadow.worker != choice.worker.url
        if number % self._every and not (tag.explained or differs or trail is not None):
            return
        if not self._explains or len(self._noted) >= _MOST_NOTED:
            return
        try:
            considered = pool.policy.consider(facts, _some_of(candidates, choice), now)
        except Exception as error:  # a fault of the policy
            self._explains = False
            self._fault(error)
            return
        attempt = DecisionAttempt(
            1 if trail is None else trail.retries + 1,
            now - tag.start,
            choice.worker.url,
            choice.branch,
            choice.matched,
            choice.total,
            len(facts.text),
            len(candidates),
            considered,
            self._excluded(pool, candidates, trail, now, choice.branch == HOLDER),
            "",
            shadow,
            choice.worker.role,
        )
        self._noted.setdefault(number, []).append(attempt)

    def _excluded(
        self, pool: Serving, candidates: Candidates, trail: Trail | None, now: float, held: bool
    ) -> list[Considered]:
        """Return workers that are no candidates, with reasons."""
        found: list[Considered] = []
        if len(candidates) < len(pool.workers):
            for worker in pool.workers:
                if worker not in candidates:
                    why = reason(worker, self.most_load, trail, now, held)
                    found.append(Considered(worker.url, 0, None, None, worker.load, why))
                    if len(found) == MOST_CONSIDERED:
                        break
        return found

    # -- what came of it -----------------------------------------------------------------------------------------------

    def retried(self, event: Retried) -> None:
        """Keep how an attempt ended."""
        self._failed.setdefault(event.tag.number, []).append(event.outcome.label)

    def finished(self, event: Finished) -> None:
        """Keep the record of a request that ended."""
        self.finished_all((event,))

    def finished_all(self, events: Sequence[Finished]) -> None:
        """Keep the records of requests that ended."""
        records, noted, usual, epoch, sink = self._records, self._noted, self.policy, self._epoch(), self.sink
        policy_of = self.policy_of
        tabled, most_lines = self._tabled, self.most * LINES_PER_RECORD
        for event in events:
            tag, leg, answer = event.tag, event.leg, event.answer
            endpoint, outcome, first = tag.route.endpoint, answer.outcome, answer.first_byte
            if not endpoint:  # the control plane
                continue
            worker: str | None = None
            branch = ""
            matched = total = 0
            policy = usual
            if leg is not None:
                worker, branch, matched, total = leg.target.name, leg.branch, leg.matched, leg.total
                if policy_of is not None:
                    policy = policy_of(worker) or usual
            ended = _UNROUTED if outcome is None or leg is None else outcome.label
            record = DecisionRecord(
                tag.id,
                tag.start + epoch,
                endpoint,
                plain_name(tag.model),
                _session(tag) if tag.named[1] else "",
                tag.streaming,
                tag.received,
                policy,
                worker,
                branch,
                matched,
                total,
                answer.retries,
                ended,
                answer.status,
                answer.code,
                first if first >= 0.0 else None,
                answer.duration,
            )
            if leg is not None:
                if leg.model:
                    record.served_model = plain_name(leg.model.decode("utf-8", "replace"))
                if leg.partner is not None:
                    _add_prefill(record, leg.partner)
            if answer.usage is not None:
                _tell(record, answer.usage)
            if noted and (attempts := noted.pop(tag.number, None)) is not None:
                self._complete(record, attempts, self._failed.pop(tag.number, []))
            elif self._failed:
                self._failed.pop(tag.number, None)
            if sink is not None:
                sink(record, tag.session if tag.named[1] else "", *self._texts.pop(tag.number, _NO_TEXT))
            records.append(record)
        while len(records) > self.most:
            if records.popleft().attempts:
                self._lines -= _lines_of(tabled.popleft())
        while self._lines > most_lines and len(tabled) > 1:
            self._lines -= _lines_of(tabled[0])
            tabled.popleft().attempts = ()

    def _complete(self, record: DecisionRecord, attempts: list[DecisionAttempt], failed: list[str]) -> None:
        """Add the attempts to a record, with how each ended."""
        for attempt in attempts:
            number = attempt.attempt
            attempt.outcome = failed[number - 1] if number <= len(failed) else record.outcome
        record.attempts = tuple(attempts)
        self._tabled.append(record)
        self._lines += _lines_of(record)

    # -- questions -----------------------------------------------------------------------------------------------------

    def ended(self) -> list[DecisionRecord]:
        """Return the records that are kept, the newest first."""
        return list(reversed(self._records))

    def latest(self, most: int) -> list[DecisionRecord]:
        """Return the last so many of these records, the newest first; the others are not looked at."""
        return list(islice(reversed(self._records), most))

    def running(self, leases: Iterable[Lease], now: float, ids: Container[str] = ()) -> Iterator[DecisionRecord]:
        """Return the records of requests in flight, the newest first, at most `MOST_RUNNING`.

        leases  those that are open
        ids     of the requests that are wanted; empty: all
        """
        epoch = self._epoch()
        wanted = [each for each in leases if not each.closed and (not ids or each.tag.id in ids)]
        readers = {each.tag.number: each for each in wanted if each.worker.role == PREFILL}
        paired = {each.tag.number for each in wanted if each.worker.role == DECODE} if readers else _NO_NUMBERS
        if paired:  # the decode worker's stands for both
            wanted = [each for each in wanted if each.tag.number not in paired or each.worker.role != PREFILL]
        for lease in heapq.nlargest(MOST_RUNNING, wanted, key=_start_of):
            tag, choice = lease.tag, lease.choice
            failed = self._failed.get(tag.number, [])
            attempts = tuple(self._noted.get(tag.number, ()))
            policy_of, name = self.policy_of, lease.worker.url
            record = DecisionRecord(
                tag.id,
                tag.start + epoch,
                tag.route.endpoint,
                plain_name(tag.model),
                _session(tag),
                tag.streaming,
                tag.received,
                self.policy if policy_of is None else policy_of(name) or self.policy,
                name,
                choice.branch,
                choice.matched,
                choice.total,
                len(failed),
                _RUNNING,
                0,
                "",
                None,
                now - tag.start,
                served_model=_served_model(lease),
                attempts=attempts,
            )
            if tag.number in paired:
                reader = readers[tag.number]
                record.prefill_worker, record.prefill_branch = reader.worker.url, reader.choice.branch
                record.prefill_matched = reader.choice.matched
            yield record


def _add_prefill(record: DecisionRecord, leg: PlannedLeg) -> None:
    """Add the first half of a pair."""
    record.prefill_worker, record.prefill_branch, record.prefill_matched = leg.target.name, leg.branch, leg.matched


def _tell(record: DecisionRecord, usage: Usage) -> None:
    """Add what the engine told."""
    record.prompt_tokens = usage.prompt if usage.prompt >= 0 else None
    record.cached_tokens = usage.cached if usage.cached >= 0 else None
    record.completion_tokens = usage.completion if usage.completion >= 0 else None


def _some_of(candidates: Candidates, choice: Choice) -> Candidates:
    """Return the candidates if they are few; else the chosen one, and those with the fewest requests in flight."""
    if len(candidates) <= MOST_CONSIDERED:
        return candidates
    found = 1 << choice.worker.seat
    count = 1
    levels = candidates.roster.levels
    for load in sorted(levels):
        mask = levels[load] & candidates.mask & ~found
        while mask and count < MOST_CONSIDERED:
            lowest = mask & -mask
            mask ^= lowest
            found |= lowest
            count += 1
    return candidates.those(found)


def _served_model(lease: Lease) -> str | None:
    """Return what the engine was told instead of the model that the client named; None: the same."""
    facts = lease.facts
    asked = facts.asked or facts.model
    told = lease.worker.spoken(asked, facts.model) if asked else asked
    return None if told == asked else plain_name(told.decode("utf-8", "replace"))


def _session(tag: RequestTag) -> str:
    return tag.session[:_LONGEST_SESSION]


def _lines_of(record: DecisionRecord) -> int:
    return sum(len(attempt.considered) + len(attempt.excluded) for attempt in record.attempts)


def _start_of(lease: Lease) -> float:
    return lease.tag.start
