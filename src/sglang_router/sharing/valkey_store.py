"""A store by the client library `valkey`, which speaks to Valkey and Redis alike; it is imported only where
--shared-state asks for it.

    {PREFIX}:placements, {PREFIX}:loads, {PREFIX}:orders      streams; an entry has one field, `b`
    {PREFIX}:key                                              the fleet's key, where no file has it
    {PREFIX}:leader                                           who decides about scaling, with an expiry

The braces are part of the names: in a cluster they keep all keys in one slot, so that one read follows all streams.

Reading waits in the store on a connection of its own. Nothing is retried here: who asks knows if it is still of use.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from valkey.asyncio import ConnectionPool, Sentinel, Valkey, ValkeyCluster
from valkey.asyncio.cluster import ClusterNode
from valkey.asyncio.connection import Connection
from valkey.asyncio.retry import Retry
from valkey.asyncio.sentinel import (
    MasterNotFoundError,
    SentinelConnectionPool,
    SentinelManagedConnection,
)
from valkey.backoff import NoBackoff
from valkey.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    ValkeyClusterException,
    ValkeyError,
)
from valkey.exceptions import ConnectionError as NoConnection
from valkey.exceptions import TimeoutError as TooLate

from sglang_router.config.store_urls import CLUSTER, SENTINEL, StoreURL
from sglang_router.sharing.bounded_answers import BoundedParser
from sglang_router.sharing.connections import SentinelDoor, SentinelTLSConnection, SentinelTLSDoor, StoreTLSConnection
from sglang_router.sharing.login import StoreLogin
from sglang_router.sharing.store import START, Appended, LeaderHold, Position, StoreFailed, StreamEntry, Trouble

T = TypeVar("T")

ANSWERS_WITHIN: Final = 3.0
"""Seconds for each answer, and for each connection."""
_FIELD: Final = b"b"
_LONGEST_TEXT: Final = 200
_STRANGE: Final = re.compile(r"[^\x20-\x7e]+")
_MS: Final = 1000

_HOLD: Final = """
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    return 1
end
if not holder or holder == '' then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    return holder and 2 or 3
end
local left = redis.call('PTTL', KEYS[1])
if left < 0 or left > tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
"""Answers are values of `LeaderHold`. The leadership of another holder that does not end in time, because the clock of
the store was set back or somebody else wrote the key, is made to."""
_RESIGN: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], '', 'PX', ARGV[2]) end
return 0
"""
_VACANT_MS: Final = 15_000
"""For how long it is known that the leadership was given back."""

_ADVICE: Final = {
    Trouble.UNREACHABLE: "cannot be reached",
    Trouble.SLOW: "does not answer in time",
    Trouble.DENIED: "denies access: check user, password and rights",
    Trouble.FULL: "is full: give it more memory, or a lower --shared-state-memory",
    Trouble.READ_ONLY: "cannot be written to: it is a replica, or cannot write its disk",
    Trouble.FOREIGN: "holds something else under a key of ours: choose another --shared-state-prefix",
    Trouble.REFUSED: "refuses a command",
}


class ValkeyStore:
    """See the module.

    url      where it is
    login    user and password for new connections
    prefix   what the names of its keys begin with
    context  returns the TLS context for a new connection; None: no TLS
    within   seconds for each answer, and for each connection; above 1, for which reading waits in the store
    """

    def __init__(
        self,
        url: StoreURL,
        login: StoreLogin,
        prefix: str,
        context: Callable[[], ssl.SSLContext] | None,
        within: float = ANSWERS_WITHIN,
    ) -> None:
        self._url = url
        self._login = login
        self._names = f"{{{prefix}}}:"
        self._make = partial(_clients, url, login, context, within)
        self._clients = self._make()

    def __repr__(self) -> str:
        return f"<ValkeyStore {self._url.shown}>"

    @property
    def _client(self) -> Any:
        return self._clients[0]

    # -- streams -------------------------------------------------------------------------------------------------------

    async def append(self, batch: Sequence[Appended]) -> list[Position | StoreFailed]:
        pipe = self._pipeline()
        for each in batch:
            pipe.execute_command("XADD", self._name(each.stream), "MAXLEN", "~", each.most, "*", _FIELD, each.payload)
        return await self._ask_all(pipe, len(batch), _position)

    async def follow(self, positions: Mapping[str, Position], most: int, wait: float) -> dict[str, list[StreamEntry]]:
        streams = {self._name(stream): _id(position) for stream, position in positions.items()}
        return await self._ask(
            self._client.xread(streams, count=most, block=int(wait * _MS)),
            lambda found: {
                stream: list(map(_entry, entries))
                for name, entries in found or ()
                if (stream := name.decode()[len(self._names) :]) in positions and entries
            },
        )

    async def older(self, stream: str, newest: Position, most: int) -> list[StreamEntry]:
        asked = self._client.xrevrange(self._name(stream), _id(newest), count=most)
        return await self._ask(asked, lambda found: list(map(_entry, found)))

    async def ends(self, streams: Sequence[str]) -> dict[str, Position]:
        pipe = self._pipeline()
        for stream in streams:
            pipe.xinfo_stream(self._name(stream))
        found = await self._ask_all(pipe, len(streams), lambda about: _position(about["last-generated-id"]))
        return {stream: _end(answer) for stream, answer in zip(streams, found, strict=True)}

    async def tidy(self, kept: Mapping[str, tuple[float, float | None]]) -> None:
        ends = await self.ends([stream for stream, (_, age) in kept.items() if age is not None])
        for stream, (life, age) in kept.items():
            name = self._name(stream)
            if age is not None and ends[stream][0] > age * _MS:
                oldest = ends[stream][0] - int(age * _MS)  # by the store's own clock
                await self._ask(self._client.xtrim(name, minid=oldest, approximate=True), _ignored)
            await self._ask(self._client.pexpire(name, int(life * _MS)), _ignored)

    # -- single keys ---------------------------------------------------------------------------------------------------

    async def shared_key(self, own: bytes) -> bytes:
        name = self._name("key")
        key = await self._ask(self._client.get(name), _key)
        if key is None:
            await self._ask(self._client.set(name, own.hex(), nx=True), _ignored)
            key = await self._ask(self._client.get(name), _key)
        if key is None or len(key) != len(own):
            raise self._failed(Trouble.FOREIGN, f"{name} is no key of a fleet")
        return key

    async def hold(self, holder: str, seconds: float) -> LeaderHold:
        ms = int(seconds * _MS)
        return await self._ask(self._client.eval(_HOLD, 1, self._name("leader"), holder, ms), LeaderHold)

    async def resign(self, holder: str) -> None:
        await self._ask(self._client.eval(_RESIGN, 1, self._name("leader"), holder, _VACANT_MS), _ignored)

    async def close(self) -> None:
        await _close(self._clients)

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _name(self, part: str) -> str:
        return self._names + part

    def _pipeline(self) -> Any:
        """Make what sends several commands in one round trip."""
        return self._client.pipeline() if self._url.kind == CLUSTER else self._client.pipeline(transaction=False)

    async def _ask_all(self, pipe: Any, count: int, read: Callable[[Any], T]) -> list[T | StoreFailed]:
        """Send commands, and read each answer; a failure in place of one that is an error. Raises: StoreFailed."""

        def read_all(answers: list[Any]) -> list[T | Exception]:
            if len(answers) != count:
                raise ValueError("there is no answer for each command")
            return [each if isinstance(each, Exception) else read(each) for each in answers]

        answers = await self._ask(pipe.execute(raise_on_error=False), read_all)
        return [await self._failure(answer) if isinstance(answer, Exception) else answer for answer in answers]

    async def _ask(self, answer: Awaitable[Any], read: Callable[[Any], T]) -> T:
        """Wait for an answer of the client library, and read it. Raises: StoreFailed, in place of all that is raised:
        the library's parsers, its view of a cluster and our reading raise anything when a server answers strangely."""
        try:
            return read(await answer)
        except Exception as error:
            raise await self._failure(error) from None

    async def _failure(self, error: Exception) -> StoreFailed:
        """Return what an error means."""
        why = _HINTS.get(str(error).partition(" ")[0], str(error))
        if isinstance(error, MasterNotFoundError):
            why = f"no Sentinel that answers knows where {self._url.service} is"
        trouble = _trouble(error)
        if self._url.kind == CLUSTER and trouble in (Trouble.UNREACHABLE, Trouble.SLOW):
            # The client forgets the nodes that it could not reach, those of the URL as well.
            old, self._clients = self._clients, self._make()
            await _close(old)
        return self._failed(trouble, why)

    def _failed(self, trouble: Trouble, why: str) -> StoreFailed:
        why = _STRANGE.sub(" ", self._login.hide(why))[:_LONGEST_TEXT].rstrip(". ")
        return StoreFailed(trouble, f"{self._url.shown} {_ADVICE[trouble]}{f' ({why})' if why else ''}")


def _trouble(error: Exception) -> Trouble:
    """Return what an error of the client library means."""
    if isinstance(error, ValkeyClusterException) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what each node of the cluster answered
    for kinds, trouble in _KINDS:
        if isinstance(error, kinds):
            return trouble
    if isinstance(error, ResponseError):
        code = str(error).partition(" ")[0]
        return _CODES.get(code, Trouble.REFUSED)
    return Trouble.UNREACHABLE


_KINDS: Final[tuple[tuple[tuple[type[Exception], ...], Trouble], ...]] = (
    ((AuthenticationError, AuthorizationError, NoPermissionError), Trouble.DENIED),
    ((OutOfMemoryError,), Trouble.FULL),
    ((ReadOnlyError,), Trouble.READ_ONLY),
    ((TooLate, asyncio.TimeoutError), Trouble.SLOW),
    ((BusyLoadingError, NoConnection, OSError, ValkeyClusterException, ClusterError), Trouble.UNREACHABLE),
)
_HINTS: Final = {"MOVED": "it is a node of a cluster: write redis+cluster:// in its URL"}
_CODES: Final = {
    "NOAUTH": Trouble.DENIED,
    "WRONGPASS": Trouble.DENIED,
    "NOPERM": Trouble.DENIED,
    "OOM": Trouble.FULL,
    "READONLY": Trouble.READ_ONLY,
    "MISCONF": Trouble.READ_ONLY,
    "NOREPLICAS": Trouble.READ_ONLY,
    "WRONGTYPE": Trouble.FOREIGN,
    "CLUSTERDOWN": Trouble.UNREACHABLE,
    "MASTERDOWN": Trouble.UNREACHABLE,
}


# -- ids and entries ---------------------------------------------------------------------------------------------------


def _id(position: Position) -> str:
    return f"{position[0]}-{position[1]}"


def _position(text: bytes) -> Position:
    milliseconds, _, number = text.partition(b"-")
    return int(milliseconds), int(number)


def _end(found: Position | StoreFailed) -> Position:
    """Return the end of a stream that may not be there. Raises: StoreFailed."""
    if not isinstance(found, StoreFailed):
        return found
    if found.trouble is Trouble.REFUSED and "no such key" in str(found):
        return START
    raise found


def _entry(found: tuple[bytes, Mapping[bytes, bytes] | None]) -> StreamEntry:
    position, fields = found
    return StreamEntry(_position(position), (fields or {}).get(_FIELD))


def _key(kept: bytes | None) -> bytes | None:
    """Return the key in a text; b"" when there is something else; None for no text."""
    try:
        return None if kept is None else bytes.fromhex(kept.decode("ascii"))
    except ValueError:
        return b""


def _ignored(answer: object) -> None:
    """Read nothing of an answer."""


# -- the client --------------------------------------------------------------------------------------------------------


def _clients(
    url: StoreURL, login: StoreLogin, context: Callable[[], ssl.SSLContext] | None, within: float
) -> list[Any]:
    """Make a client, which connects when it is asked for something; after it, those that it asks itself."""
    options: dict[str, Any] = {
        "socket_timeout": within,
        "socket_connect_timeout": within,
        "socket_keepalive": True,
        "client_name": "sglang-router",
        "retry": Retry(NoBackoff(), 0),
        "parser_class": BoundedParser,
    }
    to_server = {**options, "credential_provider": login if login.given else None, "db": url.database}
    secure: dict[str, Any] = {} if context is None else {"current": context}
    plain = Connection if context is None else StoreTLSConnection
    if url.kind == SENTINEL:
        door = SentinelDoor if context is None else SentinelTLSDoor
        more = {**options, **secure, "login": login}
        pools = [ConnectionPool(door, host=host, port=port, **more) for host, port in url.hosts]
        sentinels = Sentinel([])  # type: ignore[no-untyped-call]
        sentinels.sentinels = list(map(Valkey.from_pool, pools))
        managed = SentinelManagedConnection if context is None else SentinelTLSConnection
        more = {"connection_class": managed, **to_server, **secure}
        pool = SentinelConnectionPool(url.service, sentinels, **more)  # type: ignore[no-untyped-call]
        return [Valkey.from_pool(pool), *sentinels.sentinels]
    if url.kind == CLUSTER:
        return [_cluster(url, {**to_server, "connection_class": plain, **secure})]
    host, port = url.hosts[0]
    return [Valkey.from_pool(ConnectionPool(plain, host=host, port=port, **to_server, **secure))]


async def _close(clients: Sequence[Any]) -> None:
    for each in clients:
        with contextlib.suppress(ValkeyError, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(each.aclose(), ANSWERS_WITHIN)


def _cluster(url: StoreURL, options: dict[str, Any]) -> ValkeyCluster:
    del options["db"]
    named = {name: options[name] for name in ("credential_provider", "client_name", "socket_timeout", "retry")}
    client = ValkeyCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in url.hosts],
        require_full_coverage=False,  # all keys are in one slot
        cluster_error_retry_attempts=1,
        connection_error_retry_attempts=0,
        **named,
    )
    # The constructor takes no class of connections.
    client.connection_kwargs.update(options)
    client.nodes_manager.connection_kwargs.update(options)
    for node in client.nodes_manager.startup_nodes.values():
        node.connection_kwargs.update({name: value for name, value in options.items() if name != "connection_class"})
        node.connection_class = options["connection_class"]
    return client
