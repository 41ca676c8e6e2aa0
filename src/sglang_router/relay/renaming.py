"""Let a body name another model than the client wrote: where the engine does not know the client's name for it.

    {"model":"gpt-4","messages":[...]}      form: name="model"  gpt-4
              |                                                 |
    {"model":"llama-70b","messages":[...]}                      llama-70b

Only the value of `model` changes, in length too; every other byte stays. A large body is not copied. What routing has
found of it (`Facts.name_at`, `Facts.place`) says where to cut; a small JSON body is skimmed here, which takes
microseconds, and one in UTF-16 becomes UTF-8, in which the name is written. (Adding a second member `model` at the end
would be quicker, but engines that read strictly refuse a name that stands there twice.)
"""

from __future__ import annotations

from typing import Final

import msgspec

from sglang_router.errors import RouterError
from sglang_router.routing.facts import Facts
from sglang_router.routing.multipart import span_of
from sglang_router.routing.skim import Skim
from sglang_router.routing.tolerant import in_utf8
from sglang_router.wire.gathering import Body
from sglang_router.wire.splice import Spliced, replace, replace_and_splice, splice

_WANTED: Final = frozenset((b"model",))


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
