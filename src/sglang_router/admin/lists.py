"""Lists of what workers keep, each merged into one: files, batches, and Ollama's models.

    GET /v1/files, /v1/batches     worker 1: f1 f2 | worker 2: f3 | ...    their lists one after the other, not by time
        ?limit=2                   f1 f2, has_more
        ?limit=2&after=f2          who keeps f2? worker 1: its list after f2, then those of the workers behind it;
                                   of several that keep it (a folder that they share) the last one
    GET /api/tags, /api/ps         the models of all; those that can be loaded once each

A client that follows `after` so sees each object once, as often as it asks. It does not go in a circle where an engine
lists something twice: a page begins behind the last place of the entry that ended the one before. All workers are asked
at the same time, and each for a page only, so an answer is bounded. A worker whose list goes on ends the page: what
follows is its own. One that says so of a page without anything new has no more.

A worker without such a list (404) keeps nothing. One that does not answer is missing in the list, which says so:
`unavailable_workers` is their number. An engine's entries are passed on as they are.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.ask import Reply, all_of, ask, get_from_all, passed_on
from sglang_router.admin.context import JSON, Context
from sglang_router.errors import InvalidRequest, NotFound, WorkerUnreachable
from sglang_router.routing.worker import Worker
from sglang_router.workers.fetch import Fetched

MOST_ENTRIES = 10_000
"""Entries of one answer; OpenAI's limit for a page of files."""
_LIMIT = re.compile("[1-9][0-9]{0,3}|10000")
_MOST_PAGE = 1 << 22
"""Bytes of one worker's page; a longer one counts as no answer."""
_SHORT = 1 << 15
"""Bytes of pages that are decoded and joined at once; longer ones in a thread."""
_ABSENT = (404, 405, 501)
"""What engines without such a list answer."""


class _Page(msgspec.Struct):
    """A worker's answer: of OpenAI's kind, or of Ollama's."""

    data: list[msgspec.Raw] = []
    models: list[msgspec.Raw] = []
    has_more: bool = False


class _Named(msgspec.Struct):
    """What tells an entry from others."""

    id: str = ""
    name: str = ""


_decode = msgspec.json.Decoder(_Page).decode
_named = msgspec.json.Decoder(_Named).decode


async def objects(context: Context, request: Request) -> Response:
    """Return a page of the files, or of the batches, of all workers.

    Raises: InvalidRequest for a bad limit; NotFound for an unknown `after`, and where no engine keeps such things.
    """
    path: str = request.state.path
    query = parse_qsl(request.url.query, keep_blank_values=True)
    limit, after = _limit(query), dict(query).get("after", "")
    workers, sent = _engines(context), context.sent(request)
    if after:
        named = quote(after, safe="") if after.strip(".") else "%20"  # no way up from the path
        found = await get_from_all(context, workers, f"{path}/{named}".encode(), sent)
        keeps = [at for at, (_, reply) in enumerate(found) if isinstance(reply, Fetched) and reply.ok]
        if not keeps:
            raise NotFound(f"No worker keeps what `after` names: {after[:100]!r}.", param="after")
        workers = workers[keeps[-1] :]
    others = [(name, value) for name, value in query if name != "after"]
    targets = [_target(path, query), *[_target(path, others)] * (len(workers) - 1)]
    replies = await all_of(
        ask(context, worker, b"GET", target, sent=sent) for worker, target in zip(workers, targets, strict=True)
    )
    pages = await _pages(replies)
    if not any(pages):
        return await _nothing(context, path, replies)
    parts = (pages, after, limit, _missing(replies, pages))
    return JSON(_joined(*parts) if _short(replies) else await asyncio.to_thread(_joined, *parts))


async def models(context: Context, request: Request) -> Response:
    """Return the models of all workers in Ollama's form: those that can be loaded (/api/tags), or are (/api/ps).

    Raises: NotFound, where no engine has such a list.
    """
    path: str = request.state.path
    asked = await get_from_all(context, _engines(context), path.encode(), context.sent(request))
    replies = [reply for _, reply in asked]
    pages = await _pages(replies)
    if not any(pages):
        return await _nothing(context, path, replies)
    listed = [entry for page in pages if page is not None for entry in page.models][:MOST_ENTRIES]
    if path == "/api/tags":
        listed = _each_once(listed) if _short(replies) else await asyncio.to_thread(_each_once, listed)
    return JSON({"models": listed} | _missing(replies, pages))


def _each_once(listed: list[msgspec.Raw]) -> list[msgspec.Raw]:
    """The first entry of each name."""
    return list({_name_of(entry).name: entry for entry in reversed(listed)}.values())[::-1]


def _engines(context: Context) -> list[Worker]:
    """One serving worker per engine, in the order in which they were added. Raises: Unavailable."""
    return sorted({worker.spec.url: worker for worker in context.serving()}.values(), key=lambda worker: worker.order)


def _limit(query: list[tuple[str, str]]) -> int:
    """The most entries that the client wants. Raises: InvalidRequest."""
    asked = dict(query).get("limit", str(MOST_ENTRIES))
    if not _LIMIT.fullmatch(asked):
        raise InvalidRequest(f"`limit` must be a whole number from 1 to {MOST_ENTRIES}.", param="limit")
    return int(asked)


def _target(path: str, query: list[tuple[str, str]]) -> bytes:
    return (f"{path}?{urlencode(query)}" if query else path).encode()


def _short(replies: list[Reply]) -> bool:
    """Whether they are so short that the event loop can look at each entry."""
    return sum(len(reply.body) for reply in replies if isinstance(reply, Fetched)) <= _SHORT


async def _pages(replies: list[Reply]) -> list[_Page | None]:
    """What the workers have; None for one that has no such list, or did not answer."""
    return [await _page(reply) for reply in replies]


async def _page(reply: Reply) -> _Page | None:
    if not isinstance(reply, Fetched) or not reply.ok or len(reply.body) > _MOST_PAGE:
        return None
    try:
        return await asyncio.to_thread(_decode, reply.body) if len(reply.body) > _SHORT else _decode(reply.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _missing(replies: list[Reply], pages: list[_Page | None]) -> dict[str, int]:
    """How many workers may have entries that are not in the list; nothing when it is whole."""
    count = sum(
        page is None and not (isinstance(reply, Fetched) and reply.status in _ABSENT)
        for reply, page in zip(replies, pages, strict=True)
    )
    return {"unavailable_workers": count} if count else {}


def _joined(pages: list[_Page | None], after: str, limit: int, missing: dict[str, int]) -> dict[str, Any]:
    """The pages one after the other, up to the limit."""
    entries: dict[str, msgspec.Raw] = {}  # by id; one that comes again stands where it came last
    more = False
    for at, page in enumerate(pages):
        if page is None or more:
            continue
        data = page.data if at or not after else _behind(page.data, after)
        for number, entry in enumerate(data[:MOST_ENTRIES]):
            name = _name_of(entry).id or f"\0{at},{number}"
            if name not in entries and len(entries) == limit:
                more = True
                break
            entries.pop(name, None)
            entries[name] = entry
        more = more or len(data) > MOST_ENTRIES or (page.has_more and bool(data))
    named = list(entries.values())
    ends = {"first_id": _name_of(named[0]).id, "last_id": _name_of(named[-1]).id} if named else {}
    return {"object": "list", "data": named, **ends, "has_more": more, **missing}


def _behind(data: list[msgspec.Raw], after: str) -> list[msgspec.Raw]:
    """The entries behind the last one with this id: an engine may list all, whatever it is asked."""
    name = after.encode()
    places = (at for at in reversed(range(len(data))) if name in bytes(data[at]) and _name_of(data[at]).id == after)
    return data[next(places, -1) + 1 :]


def _name_of(entry: msgspec.Raw) -> _Named:
    try:
        return _named(entry)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Named()


async def _nothing(context: Context, path: str, replies: list[Reply]) -> Response:
    """The answer when no worker has given a list: an engine's own, if it takes this for the client's mistake.

    Raises: NotFound, when no engine has one; WorkerUnreachable, when that is not known.
    """
    for reply in replies:
        if isinstance(reply, Fetched) and 400 <= reply.status < 500 and reply.status not in _ABSENT:
            return await passed_on(context, reply)
    if all(isinstance(reply, Fetched) and reply.status in _ABSENT for reply in replies):
        raise NotFound(f"No worker has {path}: their engines do not know it.")
    raise WorkerUnreachable(f"No worker answered {path}.")
