"""`sglang-router explain ID`: ask a running router why a request got its worker, and print that for people.

    exit status   0   the decision was found and printed
                  1   the router keeps no decision about this request
                  2   the command line cannot be used
                  3   no router answers there
                  4   the router does not let this key read its control plane

Everything that a client chose (id, model, session) is escaped where a terminal would not print it. Keys are never
printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

import msgspec

from sglang_router.commands.asking import (
    NO_ROUTER,
    REFUSED,
    UNREADABLE,
    Door,
    Failed,
    door_of,
    new_parser,
    quoted,
    told,
)
from sglang_router.commands.printable import pretty, shown
from sglang_router.config.flags import OptionParser
from sglang_router.routing.assignment import HOLDER
from sglang_router.routing.considered import Considered
from sglang_router.routing.decision_record import DecisionAttempt, DecisionRecord
from sglang_router.routing.excluded import REASONS
from sglang_router.routing.roles import REGULAR
from sglang_router.routing.sessions import BRANCH
from sglang_router.words import counted

NOT_FOUND = REFUSED

BRANCHES = {
    "hit": "it is believed to have the longest part of the prompt cached",
    "miss": "no worker is known to have enough of the prompt, and it had the least cached, or cost the least",
    "spill": "another worker has a longer part of the prompt cached, but this one costs less",
    "capped": "another worker has a longer part of the prompt cached, but too many requests (--cost-load-cap)",
    "imbalance": "loads were too far apart, and it had the fewest requests in flight",
    "no_text": "the request has no prompt to compare, and it had the fewest requests in flight",
    "least": "it had the fewest requests in flight",
    "turn": "it was its turn",
    "random": "it was drawn at random",
    "two": "it had fewer requests in flight than the other one that was drawn",
    "only": "there was no other candidate",
    "key": "the routing key belongs to it",
    "no_key": "the request has no routing key, and it had the fewest requests in flight",
    "prefix": "the hash of the beginning of the prompt belongs to it",
    "overflow": "the worker of that hash was overloaded",
    "vacant": "the routing key was new",
    "occupied_hit": "the routing key is assigned to it",
    "occupied_miss": "the workers to which the routing key is assigned were no candidates",
    BRANCH: "the context of the session is there",
    HOLDER: "it keeps the response that the request follows",
    "adopted": "an earlier process of the router had chosen it",
}
"""What the branches mean: those of the policies, and of what sends requests to a worker before they are asked."""


def main(words: Sequence[str], prog: str) -> int:
    """Run the command; return its exit status."""
    options = parser(prog).parse_all(words)
    door = door_of(options)
    try:
        content = _ask(door, options.id)
        record = msgspec.json.decode(content, type=DecisionRecord)
    except Failed as failed:
        print("error:", failed, file=sys.stderr)
        return failed.status
    except UNREADABLE:
        print(f"error: what answers at {door.shown} is no router that explains decisions.", file=sys.stderr)
        return NO_ROUTER
    if options.json:
        print(pretty(content))
    else:
        print("\n".join(lines(record)))
    return 0


def parser(prog: str) -> OptionParser:
    """Return the parser of the command line."""
    made = new_parser(
        prog,
        "Show why a request got its worker, and what came of it. The router keeps the last decisions"
        " (--decision-records); a request with the header `x-sglang-router-explain: 1` leaves all details.",
    )
    made.epilog = "exit status: 0 shown, 1 not found, 2 wrong options, 3 no router answers, 4 not allowed"
    made.add_argument("id", metavar="ID", help="id of the request: x-request-id of its answer")
    return made


# -- the question ------------------------------------------------------------------------------------------------------


def _ask(door: Door, request_id: str) -> bytes:
    """Return the router's answer about a request. Raises: Failed, when it has none."""
    reply = door.ask("GET", f"/decisions/{quoted(request_id)}", purpose="read decisions")
    if reply.status == 200:
        return reply.content
    if reply.status == 404 and reply.code == "decision_not_found":  # else the router is older, or it is none
        why = "the id is wrong, the request never came there, or it is too long ago (--decision-records)"
        raise Failed(NOT_FOUND, f"the router at {door.shown} keeps no decision about {shown(request_id)}: {why}.")
    if reply.status == 409:
        raise Failed(NOT_FOUND, f"the router at {door.shown} keeps no decisions.{told(reply)}")
    raise Failed(
        NO_ROUTER, f"what answers at {door.shown} cannot explain decisions: status {reply.status}.{told(reply)}"
    )


# -- the answer --------------------------------------------------------------------------------------------------------


def lines(record: DecisionRecord) -> Iterator[str]:
    """Yield the lines that explain a decision, as a terminal may print them."""
    return map(shown, _lines(record))


def _lines(record: DecisionRecord) -> Iterator[str]:
    yield f"Request {shown(record.id)}"
    about = [record.endpoint, *(["stream"] if record.stream else [])]
    about += [f"model {shown(record.model)}"] if record.model else []
    about += [f"session {shown(record.session)}"] if record.session else []
    yield f"  what      {', '.join(about)}, {counted(record.body_bytes, 'byte')}, at {_moment(record.at)}"
    if record.prefill_worker is not None:
        yield f"  prefill   {record.prefill_worker}: {_why(record.prefill_branch)}"
    yield f"  worker    {_who(record)}"
    if record.total:
        yield f"  cache     {_share(record.matched, record.total)} of the prompt was believed to be cached there"
    if record.served_model is not None:
        yield f"  served by {shown(record.served_model)}, which is an alias's model or stands in for it"
    yield f"  outcome   {', '.join(_outcome(record))}"
    if record.prompt_tokens is not None:
        yield f"  tokens    {', '.join(_tokens(record))}"
    for attempt in record.attempts:
        yield ""
        yield from _attempt(attempt)
    if not record.attempts:
        yield ""
        yield "Nothing more was recorded: send the header `x-sglang-router-explain: 1` with a request to see all that"
        yield "was looked at, or start the router with --decision-table-every 1."


def _who(record: DecisionRecord) -> str:
    if record.worker is None:
        return "none was asked"
    return f"{record.worker}, by {record.policy}: {_why(record.branch)}"


def _why(branch: str) -> str:
    return f"{branch} ({BRANCHES[branch]})" if branch in BRANCHES else shown(branch)


def _outcome(record: DecisionRecord) -> Iterator[str]:
    yield record.outcome
    if record.status:
        yield f"status {record.status}"
    if record.code:
        yield f"error {record.code}"
    if record.retries:
        yield "1 retry" if record.retries == 1 else f"{record.retries} retries"
    if record.first_byte is not None:
        yield f"first byte after {_seconds(record.first_byte)}"
    yield f"{_seconds(record.duration)} in all"


def _tokens(record: DecisionRecord) -> Iterator[str]:
    yield f"{record.prompt_tokens} of prompt"
    if record.cached_tokens is not None:
        yield f"{_share(record.cached_tokens, record.prompt_tokens or 0)} of them cached, as the engine says"
    if record.completion_tokens is not None:
        yield f"{record.completion_tokens} of completion"


def _moment(at: float) -> str:
    try:
        moment = datetime.fromtimestamp(at, timezone.utc)
    except (OverflowError, OSError, ValueError):  # what answers is no router
        return f"{at:.3g} seconds after 1970"
    return f"{moment.replace(tzinfo=None).isoformat(sep=' ', timespec='milliseconds')} UTC"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1.0 else f"{seconds:.2f} s"


def _share(part: int, whole: int) -> str:
    return f"{part * 100 // whole}% ({part:,} of {whole:,})" if whole else f"{part:,}"


class _Row(NamedTuple):
    """A line of the table."""

    mark: str
    worker: str
    cached: str
    backlog: str
    cost: str
    load: str
    note: str = ""


_HEAD = _Row("", "worker", "cached", "wait", "cost", "in flight")


def _attempt(attempt: DecisionAttempt) -> Iterator[str]:
    ended = f": {attempt.outcome}" if attempt.outcome else ", in flight"
    among = counted(attempt.candidates, "candidate")
    role = f" ({attempt.role})" if attempt.role != REGULAR else ""
    yield f"Attempt {attempt.attempt}{role}, after {_seconds(attempt.at)}, among {among}{ended}"
    rows = [_HEAD, *(_row(each, attempt) for each in _best_first(attempt)), *map(_excluded, attempt.excluded)]
    yield from _table(rows)
    left_out = attempt.candidates - len(attempt.considered)
    if left_out > 0:
        yield f"    and {counted(left_out, 'candidate')} more"
    shadow = attempt.shadow
    if shadow is not None:
        same = "the same worker" if shadow.worker == attempt.worker else shadow.worker
        costs = ""
        if shadow.cost is not None and shadow.actual_cost is not None:
            costs = f", at a cost of {shadow.cost:.4g} in place of {shadow.actual_cost:.4g}"
        yield f"    {shadow.policy} would have chosen {same}: {_why(shadow.branch)}{costs}"


def _best_first(attempt: DecisionAttempt) -> list[Considered]:
    def rank(each: Considered) -> tuple[bool, float, int, int]:
        return each.worker != attempt.worker, each.cost if each.cost is not None else 0.0, -each.matched, each.load

    return sorted(attempt.considered, key=rank)


def _row(each: Considered, attempt: DecisionAttempt) -> _Row:
    chosen = each.worker == attempt.worker
    return _Row(
        "->" if chosen else "",
        each.worker,
        _share(each.matched, attempt.total) if attempt.total else "-",
        "-" if each.backlog is None else _seconds(each.backlog),
        "-" if each.cost is None else f"{each.cost:.4g}",
        str(each.load),
        f"chosen: {shown(attempt.branch)}" if chosen else "",
    )


def _excluded(each: Considered) -> _Row:
    return _Row("", each.worker, "", "", "", str(each.load), REASONS.get(each.excluded, shown(each.excluded)))


def _table(rows: Iterable[_Row]) -> Iterator[str]:
    """Yield the rows in columns; figures are right-aligned, and columns without any figure are left out."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    kept = [column for column in columns if any(cell not in ("", "-") for cell in column[1:])]
    widths = [max(map(len, column)) for column in kept]
    texts = [column in (columns[0], columns[1], columns[-1]) for column in kept]
    for cells in zip(*kept, strict=True):
        padded = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(cells, widths, texts, strict=True)
        ]
        yield f"  {'  '.join(padded)}".rstrip()
