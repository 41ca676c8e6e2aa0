"""By which name a browser asked: whether a page of somebody else may have reached the router (DNS rebinding).

    1. A browser opens a page of http://evil.example:30000.
    2. Its owner lets evil.example point to the router.
    3. For the browser page and router are of one origin now: the page may send any request, and read the answers.

All that gives such a page away is the name that it asks for. So what needs no key is not for browsers that ask for a
name which somebody else could own:

    an IP address, localhost, a name without a dot     nobody's: no server of names for all gives them to anybody
    *.localhost, *.local, *.internal, *.home.arpa      nor these (RFC 6761, 6762 and 8375; ICANN 2024)
    this machine's name, --host                        the router's own
    --control-plane-allowed-hosts                      what operators add
    any name, over TLS                                 the browser has seen a certificate for it

Programs that are no browsers may ask for any name: no foreign page runs in them.

Pure: the machine's name and the header fields are arguments.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from sglang_router.access.origins import Headers

ANY = "*"
_NOBODYS = (".localhost", ".local", ".internal", ".home.arpa")
_OF_BROWSERS = frozenset((b"origin", b"referer", b"cookie", b"accept-language"))
"""Fields of browsers, at least one of which a page cannot take out of its requests: Origin of changes, Accept-Language
of all."""
_OF_SAFE_PAGES = b"sec-fetch-"
"""Browsers add these, and no page can, to requests over TLS and to localhost only. (So does Node, which is none.)"""


class OwnNames:
    """Names that lead to this router and to nobody else.

    names  of the router, in lower case; with a dot in front: all names below it, and itself; `*`: any
    """

    __slots__ = ("_any", "_below", "_names")

    def __init__(self, names: Iterable[str] = ()) -> None:
        known = {name.rstrip(".") for name in names}
        self._any = ANY in known
        self._below = _NOBODYS + tuple(name for name in known if name.startswith("."))
        self._names = frozenset(name.removeprefix(".") for name in known)

    def foreign(self, headers: Headers, secure: bool) -> str:
        """Return the name that a browser asked for, if it may be somebody else's; "" for any other request.

        headers  of the request, names in lower case
        secure   it came over TLS
        """
        fields = dict(headers)
        authority = fields.get(b"host", b"").decode("latin-1").lower()
        if secure or self._any or not authority or not _from_browser(fields) or _from_elsewhere(fields, authority):
            return ""
        return "" if self._own(authority) else authority

    def _own(self, authority: str) -> bool:
        try:
            name = (urlsplit(f"//{authority}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if "." not in name and ":" not in name:
            return True
        return name in self._names or name.endswith(self._below) or _is_address(name)


def _from_browser(fields: dict[bytes, bytes]) -> bool:
    """Whether a browser may have sent this over plain HTTP, to a name that is not localhost."""
    if any(name.startswith(_OF_SAFE_PAGES) for name in fields):
        return False
    return not _OF_BROWSERS.isdisjoint(fields) or fields.get(b"user-agent", b"").startswith(b"Mozilla/")


def _from_elsewhere(fields: dict[bytes, bytes], authority: str) -> bool:
    """Whether the page is of another origin than the name that was asked for: it can read nothing then, unless
    --cors-allowed-origins names it, and `access.origins.of_another_site` is asked about changes."""
    page = fields.get(b"origin", b"").decode("latin-1").lower().partition("://")[2]
    return bool(page) and page != authority


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
