"""Let a body name another model than the client wrote: where the engine does not know the client's name for it.

    {"model":"gpt-4","messages":[...]}      form: name="model"  gpt-4
              |                                                 |
    {"model":"llama-70b","messages":[...]}                      llama-70b

Only the value of `model` changes, in length too; every other byte stays. A large body is not copied. What routing has
found of it (`Facts.name_at`, `Facts.place`) says where to cut; a small JSON body is skimmed here, which takes
microseconds, and one in UTF-16 becomes UTF-8, in which the name is written. A request that names its model in the
query, as one for a WebSocket does, names the other one there. (Adding a second member `model` at the end
would be quicker, but engines that read strictly refuse a name that stands there twice.)
"""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import quote_plus, unquote_plus

import msgspec

from sglang_router.errors import RouterError
from sglang_router.routing.facts import Facts
from sglang_router.routing.model_names import text_of
from sglang_router.routing.multipart import span_of
from sglang_router.routing.skim import Skim
from sglang_router.routing.tolerant import in_utf8
from sglang_router.wire.gathering import Body
from sglang_router.wire.request import Request
from sglang_router.wire.splice import Spliced, replace, replace_and_splice, splice

_WANTED: Final = frozenset((b"model",))
_MOST_FIELDS: Final = 64
"""Fields of a query that are read."""


class QueryModel(NamedTuple):
    """The model that a query names. places: where its value stands in the target, as (start, end), in order."""

    name: str
    places: tuple[tuple[int, int], ...]


def model_in_query(request: Request) -> QueryModel | None:
    """Return the model that the query of a request names.

    None without one, and with different ones: engines take the first or the last of them. A query with very many
    fields names none.
    """
    target = request.target
    at = target.find(b"?") + 1
    if not at:
        return None
    fields = target[at:].split(b"&", _MOST_FIELDS)
    if len(fields) > _MOST_FIELDS:
        return None
    names: set[str] = set()
    places: list[tuple[int, int]] = []
    for field in fields:
        name, _, value = field.partition(b"=")
        end = at + len(field)
        if _text(name) == "model":
            names.add(_text(value))
            places.append((end - len(value), end))
        at = end + 1
    return QueryModel(names.pop(), tuple(places)) if len(names) == 1 else None


def _text(part: bytes) -> str:
    return unquote_plus(part.decode("latin-1"))


def renamed_target(request: Request, facts: Facts, model: bytes) -> bytes:
    """Return the target of a request, which names this model where the query named the client's. model: JSON text."""
    found = model_in_query(request)
    if found is None or text_of(found.name) != (facts.asked or facts.model):
        return request.target
    target, name = request.target, quote_plus(msgspec.json.decode(model, type=str)).encode()
    for start, end in reversed(found.places):
        target = target[:start] + name + target[end:]
    return target


def renamed(body: Body, facts: Facts, model: bytes, members: bytes) -> Body | Spliced:
    """Return a body that names this model.

    model    the name as JSON text
    members  JSON members that are added at the end as well; b"" for none

    A body in which no model is found stays as it is, but for the members.
    """
    if not facts.endpoint.json:
        span = span_of(body)
        return body if span is None else replace(body, span, msgspec.json.decode(model, type=str).encode())
    place = facts.place
    if place is None:
        body = in_utf8(body)
    span = _span(body) if place is None else facts.name_at
    if span is None:
        return splice(body, members) if members else body
    if place is not None and members:
        return replace_and_splice(body, span, model, place, members)
    changed = replace(body, span, model)
    if not members:
        return changed
    return splice(changed if isinstance(changed, bytes) else b"".join(changed.pieces), members)


def _span(body: Body) -> tuple[int, int] | None:
    """Return where the model of a JSON object stands; None if it has none."""
    skim = Skim(body, _WANTED)
    try:
        while not skim.step():
            pass
    except RouterError:
        return None
    return skim.spans.get(b"model")
