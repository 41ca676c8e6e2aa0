"""Select the exchange that handles a request: a table by method and path, with path parameters.

    routes = Routes(otherwise=control_plane)
    routes.add(b"POST", b"/v1/chat/completions", chat)
    routes.add(b"GET", b"/v1/responses/{id}", response)       {name} stands for one segment
    routes.find(b"GET", b"/v1/responses/r-1")                 -> response
    routes.find(b"PUT", b"/elsewhere")                        -> control_plane, or what `add_unknown` has set

A client connection looks its requests up here and does not depend on what the factories make.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from sglang_router.relay.clients import AnyExchange
from sglang_router.relay.unknown_paths import UnknownPaths
from sglang_router.wire.request import Request

Factory = Callable[[Any, Request], AnyExchange]
"""Makes the exchange of a request; the first argument is its `relay.client.ClientConnection`."""

_PARAMETER: Final = re.compile(rb"\{[a-z_]+\}")


class Routes:
    """See the module. otherwise: makes the exchange of every request without a route."""

    __slots__ = ("_exact", "_otherwise", "_patterns", "_unknown", "_unknown_factory")

    def __init__(self, otherwise: Factory) -> None:
        self._otherwise = otherwise
        self._exact: dict[bytes, dict[bytes, Factory]] = {}  # path -> method -> factory
        self._patterns: dict[bytes, list[tuple[re.Pattern[bytes], Factory]]] = {}  # by method
        self._unknown: UnknownPaths | None = None
        self._unknown_factory = otherwise

    def __repr__(self) -> str:
        patterns = sum(map(len, self._patterns.values()))
        return f"<Routes {len(self._exact)} paths, {patterns} patterns{', all others' * (self._unknown is not None)}>"

    def add(self, method: bytes, path: bytes, factory: Factory) -> None:
        """Add a route: `factory` makes the exchange of each request with this method and path."""
        if _PARAMETER.search(path):
            parts = [re.escape(part) for part in _PARAMETER.split(path)]
            self._patterns.setdefault(method, []).append((re.compile(rb"[^/]+".join(parts)), factory))
        else:
            self._exact.setdefault(path, {})[method] = factory

    def add_unknown(self, paths: UnknownPaths, factory: Factory) -> None:
        """Let `factory` make the exchange of each request for one of these paths, as far as it has no route."""
        self._unknown = paths
        self._unknown_factory = factory

    def find(self, method: bytes, path: bytes) -> Factory:
        """Return the factory for a request."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods.get(method, self._otherwise)
        for pattern, factory in self._patterns.get(method, ()):
            if pattern.fullmatch(path):
                return factory
        if self._unknown is not None and self._unknown.has(method, path):
            return self._unknown_factory
        return self._otherwise

    def relays(self, request: Request) -> bool:
        """Return whether this request has a route."""
        methods = self._exact.get(request.path)
        if methods is not None:
            return request.method in methods
        return self.find(request.method, request.path) is not self._otherwise
