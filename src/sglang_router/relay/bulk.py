"""Share the event loop between large bodies and everything else: one piece of work per turn of the loop.

    bulk.add(piece)      `piece()` does a piece, about a millisecond at most, and returns whether there is more

A body of 50 MB is read from its socket, skimmed for what routing needs of it, written to a worker and freed, all in
pieces. The pieces of all bodies stand in one queue, and each turn of the loop does one of them: so a small request
waits for one piece, however large the bodies are and however many come at once. Large bodies take turns.

Reading a socket is such work as well: while bytes come fast enough, the loop reads a socket up to 32 times in one turn.
A connection that is given a full read (`relay.full_read`) pauses its socket, and a piece resumes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sglang_router.relay.memory import Discarded
from sglang_router.wire.gathering import Body
from sglang_router.wire.request import Request

Piece = Callable[[], bool]


class Bulk:
    """See the module. call_soon: calls a function in the next turn of the loop."""

    __slots__ = ("_call_soon", "_pieces")

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._pieces: deque[Piece] = deque()

    def __repr__(self) -> str:
        return f"<Bulk {len(self._pieces)} pieces>"

    def add(self, piece: Piece) -> None:
        """Call `piece` in one of the next turns, and again as long as it returns True."""
        self._pieces.append(piece)
        if len(self._pieces) == 1:
            self._call_soon(self._run)

    def discard(self, request: Request) -> None:
        """Free the large body of a request that is over, in pieces."""
        body, request.body = request.body, b""
        self.free(body)

    def free(self, body: Body) -> None:
        """Free a body in pieces if it is large; nobody else may use it any more."""
        if isinstance(body, bytearray):
            self.add(Discarded(body).step)

    def _run(self) -> None:
        """Do the first piece."""
        pieces = self._pieces
        try:
            if pieces[0]():
                pieces.append(pieces[0])
        finally:
            pieces.popleft()
            if pieces:
                self._call_soon(self._run)
