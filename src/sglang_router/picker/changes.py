"""Which header fields of a request change on its way through the gateway.

The gateway forwards what the client sent; the router would not forward all of it (`wire.headers`). So the fields that
may not reach a worker are removed, and the worker's own are set:

    removed    a client's key that this router has checked, and keys of its control plane; fields by which clients
               could choose engines and ranks (unless --trust-client-routing-fields); x-sglang-router-explain;
               accept-encoding, which the router does not forward either (unless --forward-all-headers): of a compressed
               answer it could read no tokens
    set        x-request-id; Via, by which a request that comes round again is known; the worker's key, where the
               client has none for it; the data-parallel rank; the path, where the worker's URL has one before it
"""

from __future__ import annotations

from typing import Final

from sglang_router.picker.replies import fields_of
from sglang_router.routing.plan import Target
from sglang_router.wire.headers import ForwardRules
from sglang_router.wire.request import Headers, Request
from sglang_router.wire.request_id import EXPLAIN

_KEYS: Final = (b"authorization", b"x-api-key")


def removed(request: Request, rules: ForwardRules) -> list[bytes]:
    """Return the names of the fields that the worker may not see."""
    found = [name for name, value in request.headers if _held_back(name, value, rules)]
    return list(dict.fromkeys(found))


def _held_back(name: bytes, value: bytes, rules: ForwardRules) -> bool:
    if name == EXPLAIN or (rules.guarded and name in _KEYS):
        return True
    if name == b"accept-encoding" and (name in rules.never_sent or not rules.everything):
        return True
    return rules.holds_back(name, value, b"")


def added(request: Request, target: Target, request_id: bytes, prefix: bytes, rules: ForwardRules) -> Headers:
    """Return the fields that the worker gets. prefix: the path before all of the worker's paths."""
    found: Headers = [(b"x-request-id", request_id)]
    for name, value in fields_of(rules.tail):  # Via, behind those of earlier proxies
        found.append((name, b", ".join([*[each for key, each in request.headers if key == name], value])))
    if target.key is not None and (rules.guarded or rules.authorization(request.headers) is None):
        found.append((b"authorization", b"Bearer " + target.key))
    if target.rank is not None:
        found.append((b"x-data-parallel-rank", b"%d" % target.rank))
    if prefix:
        found.append((b":path", prefix + request.target))
    return found
