"""Errors of the router as messages: the class, and what one of them has of its own."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_router.errors import InternalError, RouterError
from sglang_router.processes.message import ErrorSent, as_text


def failure_of(error: RouterError) -> ErrorSent:
    """Return an error as a message."""
    return ErrorSent(type(error).__name__, as_text(str(error)), error.param, error.retry_after, list(error.fields))


def error_of(failure: ErrorSent) -> RouterError:
    """Return the error of a message."""
    kind = _CLASSES.get(failure.name, InternalError)
    error = kind.__new__(kind)
    RouterError.__init__(error, failure.message, param=failure.param, retry_after=failure.retry_after)
    error.fields = tuple((name, value) for name, value in failure.fields)
    return error


def _classes(base: type[RouterError]) -> Iterator[type[RouterError]]:
    yield base
    for each in base.__subclasses__():
        yield from _classes(each)


_CLASSES = {each.__name__: each for each in _classes(RouterError)}
