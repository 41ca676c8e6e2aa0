"""Recognise the session that a request belongs to by what clients send anyway. Nothing of a client must change.

    1  headers     the routing key, then the names that agents and engines use for a session      `HEADERS`
    2  body        session_id, session_params.id, conversation, prompt_cache_key, metadata ...     `FIELDS`
    3  request id  conversation_t<turn>_r<retry>  -->  conversation
    4  messages    a conversation that goes on begins with all that was said before: `routing.message_chains`

The first one that gives something counts. An id that each request has anew (x-request-id, x-client-request-id, and in
this router x-correlation-id) is never a session. Only endpoints that generate text have sessions: what the others read
leaves nothing in a cache.

The hints of the body are read in the same pass as everything else that routing needs of it, and of a large body by the
same skim. Nothing here is called when no option asks for sessions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, Protocol

from sglang_router.routing.body_reader import BodyReader, held, plain
from sglang_router.routing.keys import bounded
from sglang_router.routing.reserved import HOLDERS, RESERVED

HEADERS: Final = (
    "x-smg-routing-key",
    "x-sgl-routing-key",
    "x-session-id",
    "x-session-affinity",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "x-dynamo-session-id",
    "x-litellm-session-id",
    "x-amp-thread-id",
)
"""Headers that may name a session, in order of preference."""
FIELDS: Final = (
    "session_id",
    "session_params.id",
    "conversation",
    "conversation.id",
    "prompt_cache_key",
    "metadata.user_id",
    "metadata.session_id",
)
"""Fields of a body that may name a session, in order of preference; `a.b` is the member b of the object a."""
_LINEAGE: Final = re.compile(rb"(.+)_t[0-9]{1,9}_r[0-9]{1,9}")


class Conversing(Protocol):
    """An endpoint that has sessions: an `Endpoint` of `routing.facts`."""

    name: str
    text: tuple[str, ...]
    links: tuple[str, ...]


class BodyHints:
    """Finds the session in the bodies of one endpoint.

    reader  decodes what routing needs, and the fields that may name a session
    """

    __slots__ = ("_paths", "reader")

    def __init__(self, endpoint: Conversing, fields: Iterable[str]) -> None:
        """fields: see `FIELDS`."""
        taken = {*endpoint.text, *RESERVED, *HOLDERS}
        paths = [field.partition(".") for field in fields]
        self._paths = [(holder, inner) for holder, _, inner in paths if holder not in taken]
        names = dict.fromkeys((*endpoint.links, *(holder for holder, _ in self._paths)))
        self.reader = BodyReader(endpoint.name, endpoint.text, tuple(names))

    def session(self, fields: Any) -> bytes:
        """Return the session that decoded fields name; b"" for none."""
        for holder, inner in self._paths:
            raw = bytes(getattr(fields, holder))
            if found := held(raw, inner) if inner else plain(raw):
                return bounded(found)
        return b""


class Hinted:
    """What tells the session of one request before its body is read.

    body  what finds the session in the body; None: the header told it
    """

    __slots__ = ("_id", "_session", "body")

    def __init__(self, session: bytes, raw_id: bytes, body: BodyHints | None) -> None:
        self._session = session
        self._id = raw_id
        self.body = body

    def found(self, in_body: bytes) -> bytes:
        """Return the session, of which the body says this; b"" when nothing names one."""
        if found := self._session or in_body:
            return found
        lineage = _LINEAGE.fullmatch(self._id)
        return b"" if lineage is None else bounded(lineage[1])


class SessionHints:
    """See the module.

    headers    names of the headers that may name a session, in order of preference
    fields     the fields of bodies, as in `FIELDS`
    endpoints  those that have sessions
    """

    __slots__ = ("_bodies", "_places")

    def __init__(self, headers: Iterable[str], fields: Iterable[str], endpoints: Iterable[Conversing]) -> None:
        self._places = {name.lower().encode(): place for place, name in enumerate(headers)}
        fields = tuple(fields)
        self._bodies = {row.name: BodyHints(row, fields) for row in endpoints}

    def __repr__(self) -> str:
        return f"<SessionHints {len(self._places)} headers, {', '.join(self._bodies)}>"

    def begin(self, endpoint: str, headers: Iterable[tuple[bytes, bytes]], raw_id: bytes) -> Hinted | None:
        """Look for a session in a request's header; return None for an endpoint without sessions.

        headers  names are in lower case
        raw_id   the request's id
        """
        body = self._bodies.get(endpoint)
        if body is None:
            return None
        places = self._places
        best, found = len(places), b""
        for name, value in headers:
            if places.get(name, best) < best and value:
                best, found = places[name], value
        return Hinted(bounded(found), raw_id, None) if found else Hinted(b"", raw_id, body)
