"""The last decisions: which worker each request got, why, and what came of it.

GET /decisions             the newest first; filters by worker, model, session, outcome and branch
GET /decisions/{request}   that of one request, by its id
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.context import JSON, Context
from sglang_router.admin.decision_book import DecisionBook
from sglang_router.errors import Conflict, DecisionNotFound, InvalidRequest
from sglang_router.routing.decision_record import DecisionRecord

FILTERS = ("worker", "model", "session", "outcome", "branch")
"""Parameters that a record must have the value of."""
_LIMIT, _MOST = 100, 1000
_PORTION = 2048
"""Records that are looked at in one turn of the event loop."""


async def index(context: Context, request: Request) -> Response:
    """Return the decisions that pass all filters, the newest first.

    Raises: InvalidRequest, when `limit` is no number from 1 to 1000; Conflict, when none are kept.
    """
    query = request.query_params
    limit = _limit(query)
    wanted = [(name, query[name]) for name in FILTERS if name in query]
    found: list[DecisionRecord] = []
    records = _book(context).read()
    for portion in _portions(records):
        found += (record for record in portion if all(str(getattr(record, name)) == value for name, value in wanted))
        if len(found) >= limit:
            break
        await asyncio.sleep(0)
    return JSON({"decisions": found[:limit], "kept": len(records)})


async def show(context: Context, request: Request) -> Response:
    """Return the decision about one request; the newest, if several have its id.

    Raises: DecisionNotFound, when there is none; Conflict, when none are kept.
    """
    name: str = request.path_params["request"]
    names = {name, name.encode("utf-8", "surrogateescape").decode("latin-1")}  # ids are shown as Latin-1
    for portion in _portions(_book(context).read(names)):
        for record in portion:
            if record.id in names:
                return JSON(record)
        await asyncio.sleep(0)
    raise DecisionNotFound


def _portions(records: list[DecisionRecord]) -> Iterator[list[DecisionRecord]]:
    return (records[start : start + _PORTION] for start in range(0, len(records), _PORTION))


def _book(context: Context) -> DecisionBook:
    if context.decisions is None:
        raise Conflict("No decisions are kept: this router was started with --decision-records 0.")
    return context.decisions


def _limit(query: Mapping[str, str]) -> int:
    text = query.get("limit", str(_LIMIT))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MOST)) and 0 < int(text) <= _MOST):
        raise InvalidRequest(f"limit is not a number from 1 to {_MOST}.", param="limit")
    return int(text)
