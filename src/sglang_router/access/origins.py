"""From where a request comes: from this machine, through a proxy, from a web page, and from which one.

    is_local          made on this machine, and not for somebody elsewhere: may make changes where no key is configured
    of_another_site   a browser sent it for a page that is not the router's own: may make no change without a key

Pure: the peer's address and the header fields are arguments.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

Headers = Iterable[tuple[bytes, bytes]]


_PASSED_ON = re.compile(
    rb"via|x-scheme|remote-user|.*(?:forward|prox(?:y|ied)|client-?(?:ip|cert|dn|geo|port)|orig(?:inal|inating)?-|real-|-ip\Z|cdn)"
    rb"|(?:x-)?(?:akamai|amz|amzn|appengine|arr|azure|cf|cloud|cluster|edge|envoy|fastly|fly|gateway|haproxy|incap"
    rb"|ingress|kong|nf|nginx|ngrok|remote|rewrite|ssl|sucuri|surrogate|tailscale|traefik|varnish|vercel)-"
    rb"|x-(?:auth-request-|cache|host\Z|lb-|varnish|webauth-)"
)
"""How the names of fields begin that a proxy adds. What they say is never believed; they show that the peer speaks for
somebody else."""


def is_local(peername: object, headers: Headers) -> bool:
    """Whether a request was made on this machine, and not for somebody elsewhere.

    peername  what getpeername() gave: an IP address in a tuple, the text of a Unix socket, None when not known

    A request that a proxy forwarded does not count, nor one that a browser sent for a page from elsewhere: any web
    page can make a browser send requests to 127.0.0.1, and can even make its own name point there.
    """
    fields = dict(headers)
    return is_loopback(peername) and not _passed_on(fields) and not _of_foreign_page(peername, fields)


def _passed_on(fields: dict[bytes, bytes]) -> bool:
    """Whether a proxy forwarded this."""
    return any(map(_PASSED_ON.match, fields))


def is_loopback(peername: object) -> bool:
    """Whether a peer is on this machine: 127.0.0.0/8 (also as ::ffff:127.0.0.1), ::1, any Unix socket.

    None is not: a client that resets its connection at once leaves no address, although its request is read.
    """
    if isinstance(peername, (str, bytes)):
        return True
    return isinstance(peername, tuple) and len(peername) >= 2 and _loopback_address(str(peername[0]))


def _loopback_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def _of_foreign_page(peername: object, fields: dict[bytes, bytes]) -> bool:
    """Whether a browser may have sent this for a page from elsewhere.

    Browsers say which page made them send a request, but not always: a GET for an image has no Origin, and none has
    Sec-Fetch-* when the router was asked by a name that is not `localhost`. So no name is believed but that one: the
    name of a page's own host can be made to point here (DNS rebinding). And who says that it is a browser must say for
    which page. The router's own pages are not foreign, if they were loaded from loopback. Pages reach no Unix socket.
    """
    if isinstance(peername, (str, bytes)) and not {b"origin", b"sec-fetch-site"} & fields.keys():
        return False
    host = fields.get(b"host", b"").decode("latin-1")
    if host and not _address_or_localhost(host):
        return True
    origin, site, referer = fields.get(b"origin"), fields.get(b"sec-fetch-site"), fields.get(b"referer")
    if origin is None and site is None and referer is None:
        return fields.get(b"user-agent", b"").startswith(b"Mozilla/")
    pages = [page.decode("latin-1").partition("://")[2].partition("/")[0] for page in (origin, referer) if page]
    same_origin = origin != b"" and all(page == host for page in pages)
    return not (same_origin and site in (None, b"none", b"same-origin") and loopback_host(host))


def of_another_site(headers: Headers) -> bool:
    """Whether a browser may have sent this for a page that is not the router's own, whatever its address.

    A change without a key that comes from such a page is nobody's wish, where changes need no key
    (--control-plane-open): any web page could make an operator's browser send it. A page cannot add OWN_PAGE to a
    request to another origin without asking first, and is not allowed to (CORS). A key is in no cookie, so that a
    browser never adds one by itself: requests with a key are not asked for this.
    """
    fields = dict(headers)
    origin, site, host = fields.get(b"origin"), fields.get(b"sec-fetch-site"), fields.get(b"host", b"")
    if site is not None:  # the browser's own word, which no page can change: it counts also behind a proxy
        return site not in (b"none", b"same-origin")
    if origin is not None:
        return not host or origin.partition(b"://")[2] != host
    return OWN_PAGE not in fields and fields.get(b"user-agent", b"").startswith(b"Mozilla/")


OWN_PAGE = b"x-sglang-router-page"
"""The field that the router's own page adds to its requests."""


def _address_or_localhost(authority: str) -> bool:
    """Whether a Host names no name that somebody else could own."""
    try:
        name = urlsplit(f"//{authority}").hostname or ""
        return "@" not in authority and (name == "localhost" or bool(ipaddress.ip_address(name.partition("%")[0])))
    except ValueError:
        return False


def loopback_host(authority: str) -> bool:
    try:
        name = urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _loopback_address(name)
