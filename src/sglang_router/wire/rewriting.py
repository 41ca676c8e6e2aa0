"""Rewrite the head of a request where the router takes it for another one than its bytes say."""

from __future__ import annotations


def without_upgrade(method: bytes, target: bytes, version: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return a head without its Upgrade fields."""
    lines = [b"%s %s HTTP/%s\r\n" % (method, target, version.encode())]
    lines += [b"%s: %s\r\n" % field for field in headers if field[0] != b"upgrade"]
    return b"".join((*lines, b"\r\n"))


def origin_form(target: bytes) -> bytes:
    """Return path and query of a target in absolute form (RFC 9112 3.2.2), as proxy clients send it; `*` stays `*`."""
    whole, mark, query = target.partition(b"?")
    _, absolute, rest = whole.partition(b"://")
    return b"/" + rest.partition(b"/")[2] + mark + query if absolute else target
