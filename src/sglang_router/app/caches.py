"""Make the parts that follow what workers say of their KV caches (--kv-events), which need packages of the extra `kv`.

They are imported here, and only when the options ask for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.kv_index import KVIndex
from sglang_router.routing.prefix_tree.informed import KVCaches
from sglang_router.routing.prompt_tokens import Encode
from sglang_router.routing.shared.prefixes import SharedPrefixes
from sglang_router.routing.worker import Worker
from sglang_router.workers.kv_events import KVEvents
from sglang_router.workers.kv_sources import Templates

_INSTALL = "pip install 'sglang-router[kv]'"


def caches_of(args: RouterArgs, shared: SharedPrefixes | None = None) -> KVCaches | None:
    """Make what knows the workers' caches; None when the options do not ask for it.

    shared  what other routers placed there; None: there are none

    Raises: ConfigError, when the tokenizer cannot be loaded.
    """
    if not args.kv_events:
        return None if shared is None else KVCaches(None, shared=shared)
    path = args.kv_events_tokenizer
    return KVCaches(KVIndex(args.kv_events_max_blocks), None if path is None else tokenizer(path), shared)


def events_of(
    args: RouterArgs,
    loop: asyncio.AbstractEventLoop,
    connections: ConnectionPool,
    caches: KVCaches | None,
    emptied: Callable[[Worker], None],
) -> KVEvents | None:
    """Make what follows the events; None when the options do not ask for it. Add it to the listeners.

    emptied  hears of each worker whose cache was cleared

    Raises: ConfigError, when a package is missing.
    """
    if caches is None or caches.index is None:
        return None
    try:
        from sglang_router.workers.kv_stream import KVStreams
    except ImportError as error:
        raise ConfigError(f"--kv-events needs the package pyzmq ({error}): {_INSTALL}") from None
    templates = Templates(args.kv_events_endpoint, args.kv_events_replay_endpoint)
    return KVEvents(loop, connections, caches.index, KVStreams(), templates, emptied)


def tokenizer(path: str) -> Encode:
    """Load a tokenizer.json, or the one in a folder. Raises: ConfigError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(f"--kv-events-tokenizer needs the package tokenizers ({error}): {_INSTALL}") from None
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # its own kind, which has no name
        raise ConfigError(f"--kv-events-tokenizer cannot read {file}: {error}") from None
    loaded.no_truncation()

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = loaded.encode(text).ids
        return ids

    return encode
