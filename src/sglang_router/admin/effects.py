"""What a request of the control plane does to an engine, as far as the router must know it.

    effect_of("/pause_generation", b"", b"")                         pauses ("generation",)
    effect_of("/sleep", b"level=1", b"")                             pauses ("kv_cache", "weights"), forgets
    effect_of("/update_weights_from_disk", b"", b'{"weight_version":"7"}')    forgets, version "7"

    await fields_of(body)               what of a body matters here, as a short body
    learn(context, worker, effect)      after the engine has done it, or may have done it

The names are those of SGLang and vLLM. A paused worker gets no new requests until it has all back: an engine whose
memory is released cannot compute, and one that is paused would hold each request, which another worker could answer.
So would one that loads new weights: it is paused until it has answered (`Effect.passes`). SGLang and vLLM give memory
back in parts, as `tags`: so what a worker is without is a set of names, which `admin.pausing` keeps.

Weights that are sent in a body make it long: it is skimmed then, in steps, and not decoded.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import msgspec

from sglang_router.admin.context import Context
from sglang_router.errors import RouterError
from sglang_router.routing.skim import Skim
from sglang_router.routing.worker import UPDATING, Worker
from sglang_router.wire.gathering import Body

GENERATION, KV_CACHE, WEIGHTS, GRAPHS, OTHER = "generation", "kv_cache", "weights", "cuda_graph", "other_memory"
"""What an engine can be without: it computes nothing, or a part of its memory is released."""

_MEMORY = (KV_CACHE, WEIGHTS, GRAPHS, OTHER)
_SLEEP = (KV_CACHE, WEIGHTS)
_MOST_READ = 1 << 16
"""Bytes of a body up to which it is decoded; of a longer one, bytes of the fields below."""
_NO = ("false", "0", "off", "no", "f", "n")
"""How the query of a vLLM engine says no."""
_LONGEST_VERSION = 128
"""Characters of a version of weights that are kept."""


class Effect(NamedTuple):
    """What a request does.

    pauses     what the engine is without afterwards
    continues  what it has back afterwards
    forgets    what it had cached is gone or stale
    version    of its weights; "": nothing is said of it
    passes     it is without `pauses` only until it has answered
    """

    pauses: tuple[str, ...] = ()
    continues: tuple[str, ...] = ()
    forgets: bool = False
    version: str = ""
    passes: bool = False


NOTHING = Effect()


class _Said(msgspec.Struct):
    """The fields of a body that matter here, of any type."""

    tags: Any = None
    flush_cache: Any = None
    weight_version: Any = None
    new_version: Any = None
    level: Any = None


_FIELDS = frozenset(name.encode() for name in _Said.__struct_fields__)


async def fields_of(body: Body) -> bytes:
    """Return what of a body matters to `effect_of`; b"" for nothing, or if it cannot be read: the engine says so."""
    if len(body) <= _MOST_READ:
        return bytes(body)
    skim = Skim(body, _FIELDS)
    try:
        while True:
            if skim.step():
                break
            await asyncio.sleep(0)
    except RouterError:
        return b""
    found = {name: bytes(body[start:end]) for name, (start, end) in skim.spans.items() if end - start <= _MOST_READ}
    return b"{%b}" % b",".join(b'"%b":%b' % member for member in found.items())


def effect_of(path: str, query: bytes, body: bytes) -> Effect:
    """Return what a request does to an engine.

    path  of the engine, as the engine understands it: decoded, without the query
    body  what `fields_of` returned
    """
    if path in _PLAIN:
        return _PLAIN[path]
    if path in _NEW_WEIGHTS:
        said = _read(body)
        forgets, version = said.flush_cache is not False, _version(said.weight_version)
        return Effect((UPDATING,), forgets=forgets, version=version, passes=True)
    if path == "/update_weight_version":
        return Effect(version=_version(_read(body).new_version))
    if path not in _ASKED:
        return NOTHING
    asked = parse_qs(query.decode("latin-1"))
    if path == "/pause":
        return Effect((GENERATION,), forgets=(asked.get("clear_cache") or [""])[0].lower() not in _NO)
    said = _read(body)
    tags = _tags(asked.get("tags") or said.tags)
    if path == "/sleep":
        if (asked.get("level") or [str(said.level)])[0] == "0":
            return Effect((GENERATION,))
        return Effect(tags or _SLEEP, forgets=True)
    if path == "/release_memory_occupation":
        return Effect(tags or _MEMORY, forgets=not tags or KV_CACHE in tags)
    return Effect(continues=tags or ((GENERATION, *_MEMORY) if path == "/wake_up" else _MEMORY))


_PLAIN = {
    "/pause_generation": Effect((GENERATION,)),
    "/continue_generation": Effect(continues=(GENERATION,)),
    "/resume": Effect(continues=(GENERATION,)),
    "/flush_cache": Effect(forgets=True),
    "/reset_prefix_cache": Effect(forgets=True),
}
_ASKED = frozenset(("/pause", "/release_memory_occupation", "/resume_memory_occupation", "/sleep", "/wake_up"))
"""What these do depends on the query, or on the body."""
_NEW_WEIGHTS = frozenset(
    (
        "/update_weights_from_disk",
        "/update_weights_from_tensor",
        "/update_weights_from_distributed",
        "/update_weights_from_ipc",
        "/update_weights",
        "/finish_weight_update",
    )
)


def _read(body: bytes) -> _Said:
    """Return what a body says; nothing if it is no JSON object: the engine will say so."""
    try:
        return msgspec.json.decode(body, type=_Said)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _Said()


def _tags(said: Any) -> tuple[str, ...]:
    """Return the parts of memory that a request names; () for none."""
    named = said if isinstance(said, list) else [said] if isinstance(said, str) else []
    known = {tag if tag in _MEMORY else GENERATION if tag == "scheduling" else OTHER for tag in named if tag}
    return tuple(sorted(known))


def _version(said: Any) -> str:
    return str(said)[:_LONGEST_VERSION] if isinstance(said, (str, int)) and not isinstance(said, bool) else ""


def learn(context: Context, worker: Worker, effect: Effect, done: bool) -> None:
    """Take note of what an engine has done; not done: nobody knows whether it has, so nothing old is relied on."""
    if effect.forgets:
        context.forget_prefixes(worker)
    if effect.version:
        for entry in context.fleet.entries(worker.spec.url):
            entry.weights = effect.version if done else ""
