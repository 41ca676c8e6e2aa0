"""Connections of the client library that ask anew, each time they connect, for what may have been renewed.

The library keeps a connection in its pool after it was lost, and connects it again. So certificates and passwords are
not given to a connection when it is made: its TLS context and its login are asked for them.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from valkey.asyncio.connection import Connection, SSLConnection, ValkeySSLContext
from valkey.asyncio.sentinel import SentinelManagedSSLConnection
from valkey.exceptions import AuthenticationError

from sglang_router.sharing.login import StoreLogin


class RenewedContext(ValkeySSLContext):
    """The TLS context of now; that of the library reads all authorities of the system, each time.

    current  returns it
    """

    def __init__(self, current: Callable[[], ssl.SSLContext]) -> None:
        super().__init__()
        self._current = current

    def get(self) -> ssl.SSLContext:
        """Return the context for a connection that begins."""
        return self._current()


class StoreTLSConnection(SSLConnection):
    """A connection with TLS. current: returns the context of now."""

    def __init__(self, *, current: Callable[[], ssl.SSLContext], **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context = RenewedContext(current)


class SentinelTLSConnection(SentinelManagedSSLConnection):
    """The same to the server that Sentinels name."""

    def __init__(self, *, current: Callable[[], ssl.SSLContext], **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.ssl_context = RenewedContext(current)


class SentinelDoorLogin:
    """A connection to a Sentinel: only one that wants a password is shown that of the server."""

    credential_provider: Any

    def __init__(self, *, login: StoreLogin, **options: Any) -> None:
        super().__init__(**options)
        self._login = login

    async def on_connect(self) -> None:
        """Begin the connection. Raises: AuthenticationError."""
        try:
            await super().on_connect()  # type: ignore[misc]
        except AuthenticationError:
            self.credential_provider = self._login if self._login.given else None
            await super().on_connect()  # type: ignore[misc]


class SentinelDoor(SentinelDoorLogin, Connection):
    """Without TLS."""


class SentinelTLSDoor(SentinelDoorLogin, StoreTLSConnection):
    """With TLS."""
