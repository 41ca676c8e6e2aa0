"""Select the exchange that handles a request: a table by method and path, with path parameters.

    routes = Routes(otherwise=control_plane)
    routes.add(b"POST", b"/v1/chat/completions", chat)
    routes.add(b"GET", b"/v1/responses/{id}", response)       {name} stands for one segment
    routes.find(b"GET", b"/v1/responses/r-1")                 -> response
    routes.find(b"PUT", b"/elsewhere")                        -> control_plane

A client connection looks its requests up here and does not depend on what the factories make.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from sglang_router.relay.clients import AnyExchange
from sglang_router.wire.request import Request

Factory = Callable[[Any, Request], AnyExchange]
"""Makes the exchange of a request; the first argument is its `relay.client.ClientConnection`."""

_PARAMETER: Final = re.compile(rb"\{[a-z_]+\}")


class Routes:
    """See the module. otherwise: makes the exchange of every request without a route."""

    __slots__ = ("_exact", "_otherwise", "_patterns")

    def __init__(self, otherwise: Factory) -> None:
        self._otherwise = otherwise
        self._exact: dict[bytes, dict[bytes, Factory]] = {}  # path -> method -> factory
        self._patterns: list[tuple[bytes, re.Pattern[bytes], Factory]] = []

    def __repr__(self) -> str:
        return f"<Routes {len(self._exact)} paths, {len(self._patterns)} patterns>"

    def add(self, method: bytes, path: bytes, factory: Factory) -> None:
        """Add a route: `factory` makes the exchange of each request with this method and path."""
        if _PARAMETER.search(path):
            parts = [re.escape(part) for part in _PARAMETER.split(path)]
            self._patterns.append((method, re.compile(rb"[^/]+".join(parts)), factory))
        else:
            self._exact.setdefault(path, {})[method] = factory

    def find(self, method: bytes, path: bytes) -> Factory:
        """Return the factory for a request."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods.get(method, self._otherwise)
        for wanted, pattern, factory in self._patterns:
            if wanted == method and pattern.fullmatch(path):
                return factory
        return self._otherwise

    def relays(self, request: Request) -> bool:
        """Return whether this request has a route."""
        methods = self._exact.get(request.path)
        if methods is not None:
            return request.method in methods
        return self.find(request.method, request.path) is not self._otherwise
