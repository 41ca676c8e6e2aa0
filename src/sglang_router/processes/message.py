"""What all messages are, and those about the control plane and keys: see `processes.messages` for the others.

relay --> decider                decider --> relay
AppAsk, AppBody    a request     AppWants              the next part of the body
AppTaken           go on         AppHead, AppData      the answer
AppGone            the client left    AppFailed, AppDone    its end
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, array_like=True, gc=False):
    """What all messages have in common: they cross as arrays, the first member of which says what they are."""


def as_text(text: str) -> str:
    """Return a text that can cross: half of a surrogate pair, as in a file's name that is not UTF-8, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


class PlannedOne(Message, tag=32):
    """One leg of a plan; see PlannedLeg."""

    lease: int
    worker: int
    branch: str
    matched: int
    total: int
    splice: bytes
    rid: bytes
    model: bytes = b""
    mark: bytes = b""


class ErrorSent(Message, tag=35):
    """An error of `errors`: its class, and what one of them may have of its own."""

    name: str
    message: str
    param: str | None
    retry_after: float | None
    fields: list[tuple[str, str]]


class ReadAgain(Message, tag=47):
    """Read keys and certificates again.

    level                      of the log
    client_keys, control_keys  those of the options, which may have changed: the fields of ClientKey and ControlKey
    """

    level: int
    client_keys: list[tuple[str, str]]
    control_keys: list[tuple[str, str, str, str]]


class AppAsk(Message, tag=17):
    """A request for the control plane: an ASGI scope.

    body     its first part
    more     further parts follow, each when it is asked for
    refusal  what whoever wants the body gets instead of it: it was not read
    """

    number: int
    http: str
    method: str
    scheme: str
    path: str
    raw_path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    server: tuple[str, int] | None
    peer: list[str | int] | None
    body: bytes
    more: bool
    refusal: ErrorSent | None


class AppBody(Message, tag=18):
    """A further part of the body, which was asked for."""

    number: int
    data: bytes
    more: bool


class AppTaken(Message, tag=19):
    """A part of the answer was taken: the next one may come."""

    number: int


class AppGone(Message, tag=20):
    """The client left."""

    number: int


class AppWants(Message, tag=52):
    """The app wants the next part of the body."""

    number: int


class AppHead(Message, tag=48):
    """The head of the control plane's answer."""

    number: int
    status: int
    headers: list[tuple[bytes, bytes]]


class AppData(Message, tag=49):
    """A part of its body."""

    number: int
    data: bytes
    more: bool


class AppFailed(Message, tag=50):
    """It raised an error."""

    number: int
    error: ErrorSent


class AppDone(Message, tag=51):
    """It returned."""

    number: int
