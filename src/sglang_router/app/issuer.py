"""The public keys of an identity provider (--jwt-issuer): fetched, kept, and fetched anew.

    refresh()  every 2 s, with the files of keys and certificates (`app.jobs`); at SIGHUP at once
      due --> a task: discovery document --> JWKS document --> WebTokens.use
                        (not with --jwt-jwks-uri)    '-- anything wrong: a warning, again after a pause; keys stay

    fetched                            when
    at the start                       at once; until then tokens get 503
    again                              every 5 minutes
    after a failure                    after 5 s, 10 s ... 60 s
    for a key that is not known        at once, but not within 10 s of the last time: a stranger can name any key

The router serves while the issuer is away: the keys that it had stay in use. Nothing blocks: the documents come over
connections like those to workers, out of a pool of their own, verified by what the system trusts. Redirects are not
followed, and a document has at most 1 MiB.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

import msgspec

from sglang_router.access.permissions import TokenReader
from sglang_router.config import RouterArgs
from sglang_router.config.checks import issuer_url
from sglang_router.errors import ConfigError
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.plan import Target
from sglang_router.workers.fetch import FetchError, fetch

log = logging.getLogger("sglang_router.access")

_INSTALL = "pip install 'sglang-router[jwt]'"
_OWN_ROLES = MappingProxyType({"admin": "admin", "user": "user"})
"""What the issuer's roles are here when no option says it."""
_DISCOVERY = "/.well-known/openid-configuration"
_EVERY = 300.0
_UNKNOWN = 10.0
_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 60.0
_TIMEOUT = 10.0
_MOST_BYTES = 1 << 20


class _Failed(Exception):
    """The text says what went wrong."""


class _Discovery(msgspec.Struct):
    issuer: str = ""
    jwks_uri: str = ""


class IssuerKeys:
    """See the module.

    issuer  the issuer's URL
    uri     of its keys; None: the discovery document says it
    clock   seconds that never go back
    use     takes a JWKS document and returns the number of keys. Raises: ValueError. Set it before the first `refresh`
    """

    use: Callable[[bytes], int]

    def __init__(
        self, loop: asyncio.AbstractEventLoop, issuer: str, uri: str | None, clock: Callable[[], float]
    ) -> None:
        self._loop = loop
        self._issuer = issuer
        self._uri = uri
        self._clock = clock
        self._pool = ConnectionPool(loop, Batch(loop), connect_timeout=_TIMEOUT, idle_timeout=0.0, max_idle=0, tls=None)
        self._due = -1.0  # when the keys are fetched next
        self._asked = -_UNKNOWN  # when they were fetched last
        self._pause = _FIRST_PAUSE
        self._complaint = ""  # the last warning
        self._keys = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<IssuerKeys {self._issuer}: {self._keys} keys{', fetching' * self._fetching}>"

    @property
    def _fetching(self) -> bool:
        return self._task is not None and not self._task.done()

    def refresh(self, *, anyway: bool = False) -> bool:
        """Fetch the keys when they are due, or `anyway`. Returns False: they are in use later."""
        now = self._clock()
        if (anyway or now >= self._due) and not self._fetching and not self._closed:
            self._asked = now
            self._due = now + _EVERY
            self._task = self._loop.create_task(self._fetch())
        return False

    def wanted(self) -> bool:
        """Fetch the keys, unless that was just done: somebody has a token of a key that is not known. Return whether
        they are being fetched."""
        if self._clock() - self._asked >= _UNKNOWN:
            self.refresh(anyway=True)
        return self._fetching

    async def close(self) -> None:
        """Stop."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._pool.close()

    async def _fetch(self) -> None:
        try:
            document = await self._get(self._uri or await self._discover())
            try:
                keys = self.use(document)
            except ValueError as error:
                raise _Failed(str(error)) from None
        except _Failed as error:
            self._due = self._clock() + self._pause
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)
            kept = f"the {self._keys} keys fetched before stay in use" if self._keys else "no token is accepted yet"
            text = f"the keys of the issuer {self._issuer} cannot be fetched: {error}; {kept}"
            if text != self._complaint:
                self._complaint = text
                log.warning(text)
            return
        if keys != self._keys or self._complaint:
            log.info("the issuer %s has %d keys for signatures", self._issuer, keys)
        self._keys, self._complaint, self._pause = keys, "", _FIRST_PAUSE

    async def _discover(self) -> str:
        """Return the URL of the keys, as the issuer's discovery document says it (OpenID Connect Discovery 1.0)."""
        body = await self._get(self._issuer.rstrip("/") + _DISCOVERY)
        try:
            found = msgspec.json.decode(body, type=_Discovery)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise _Failed(f"{_DISCOVERY} is no discovery document") from None
        if found.issuer != self._issuer:
            raise _Failed("its discovery document is of another issuer; is --jwt-issuer spelled as there?")
        try:
            return issuer_url(found.jwks_uri)
        except ValueError as error:
            raise _Failed(f"jwks_uri of its discovery document: {error}") from None

    async def _get(self, url: str) -> bytes:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = Target(f"{parts.scheme}://{parts.netloc}")
        try:
            answer = await fetch(self._pool, target, b"GET", path.encode(), timeout=_TIMEOUT, max_bytes=_MOST_BYTES)
        except FetchError as error:
            text = str(error).replace("The worker's", "Its").replace("The worker", "It").replace("the worker's", "its")
            cause = text.partition(";")[0]
            raise _Failed(f"{parts.path or '/'}: {cause.rstrip('.')}") from None
        if answer.status != 200:
            raise _Failed(f"{parts.path or '/'} answers {answer.status}")
        return answer.body


def tokens_of(
    args: RouterArgs, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]
) -> tuple[TokenReader | None, IssuerKeys | None]:
    """Make what reads tokens and what fetches the keys for it; None and None when the options do not ask for it.

    Raises: ConfigError, when a package is missing.
    """
    if args.jwt_issuer is None or args.jwt_audience is None:
        return None, None
    try:
        from sglang_router.access.tokens import TokenRules, WebTokens
    except ImportError as error:
        raise ConfigError(f"--jwt-issuer needs the package PyJWT[crypto] ({error}): {_INSTALL}") from None
    keys = IssuerKeys(loop, args.jwt_issuer, args.jwt_jwks_uri, clock)
    roles: Mapping[str, str] = args.jwt_role_mapping or _OWN_ROLES
    tokens = WebTokens(TokenRules(args.jwt_issuer, args.jwt_audience, roles), time.time, keys.wanted)
    keys.use = tokens.use
    return tokens, keys
