"""Which paths belong to nobody, so that `--relay-unknown-paths` relays them unread.

    paths = UnknownPaths([b"/workers", b"/workers/{id:path}", b"/v1/responses/{id}"])
    paths.has(b"PATCH", b"/v1/fine_tuning/jobs")       True
    paths.has(b"POST", b"/workers")                    False: a path of the router itself, whatever the method
    paths.has(b"POST", b"/%77orkers")                  False: an engine would decode it to such a path
    paths.has(b"GET", b"/static/../workers")           False, as any path that can be read in two ways

An engine has the paths of the router's control plane, too (/flush_cache). Who may not ask the router for them must not
reach them through it. So a path is compared in its plainest form: decoded, without a slash at the end, in any case of
letters; and a path with a second plainest form is not relayed: with empty segments, `.` or `..`, a backslash, control
characters, or a percent sign that is left when it is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Final
from urllib.parse import unquote_to_bytes

METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))
_PARAMETER: Final = re.compile(rb"\{[^}]*\}")
_ODD: Final = re.compile(rb"[\x00-\x20\x7f\\%]|//|/\.{1,2}(?:/|\Z)")


class UnknownPaths:
    """See the module.

    own      the router's paths, relayed and others; {name} stands for one segment or more
    methods  that are relayed
    """

    __slots__ = ("_methods", "_own")

    def __init__(self, own: Iterable[bytes], methods: Container[bytes] = METHODS) -> None:
        patterns = (b".+".join(re.escape(part) for part in _PARAMETER.split(path)) for path in own)
        self._own = re.compile(b"|".join(patterns), re.IGNORECASE)
        self._methods = methods

    def has(self, method: bytes, path: bytes) -> bool:
        """Return whether a request is relayed. path: as the client sent it, without the query."""
        if method not in self._methods or not path.startswith(b"/"):
            return False
        plain = unquote_to_bytes(path)
        return _ODD.search(plain) is None and self._own.fullmatch(plain.rstrip(b"/") or b"/") is None
