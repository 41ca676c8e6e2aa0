"""What a request of the control plane does to an engine, as far as the router must know it.

    effect_of("/pause_generation", b"", b"")                         pauses ("generation",)
    effect_of("/sleep", b"level=1", b"")                             pauses ("kv_cache", "weights"), forgets
    effect_of("/update_weights_from_disk", b"", b'{"weight_version":"7"}')    forgets, version "7"

    learn(context, worker, effect)      after the engine has done it

The names are those of SGLang and vLLM. A paused worker gets no new requests until it has all back: an engine whose
memory is released cannot compute, and one that is paused would hold each request, which another worker could answer.
SGLang and vLLM give memory back in parts, as `tags`: so what a worker is without is a set of names.

A body is read only if it is short: weights that are sent in one have none of these fields in front, and reading them
would take too long.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import parse_qs

import msgspec

from sglang_router.admin.context import Context
from sglang_router.routing.worker import Worker

GENERATION, KV_CACHE, WEIGHTS, GRAPHS, OTHER = "generation", "kv_cache", "weights", "cuda_graph", "other_memory"
"""What an engine can be without: it computes nothing, or a part of its memory is released."""

_MEMORY = (KV_CACHE, WEIGHTS, GRAPHS, OTHER)
_SLEEP = (KV_CACHE, WEIGHTS)
_MOST_READ = 1 << 16
"""Bytes of a body that are searched for the fields below."""
_LONGEST_VERSION = 128
"""Characters of a version of weights that are kept."""


class Effect(NamedTuple):
    """What a request does.

    pauses     what the engine is without afterwards
    continues  what it has back afterwards
    forgets    what it had cached is gone or stale
    version    of its weights; "": nothing is said of it
    """

    pauses: tuple[str, ...] = ()
    continues: tuple[str, ...] = ()
    forgets: bool = False
    version: str = ""


NOTHING = Effect()


class _Said(msgspec.Struct):
    """The fields of a body that matter here, of any type."""

    tags: Any = None
    flush_cache: Any = None
    weight_version: Any = None
    new_version: Any = None
    level: Any = None


def effect_of(path: str, query: bytes, body: bytes) -> Effect:
    """Return what a request does to an engine. path: of the engine, as it is sent to it, without the query."""
    if path in _PLAIN:
        return _PLAIN[path]
    if path in _NEW_WEIGHTS:
        said = _read(body)
        return Effect(forgets=said.flush_cache is not False, version=_version(said.weight_version))
    if path == "/update_weight_version":
        return Effect(version=_version(_read(body).new_version))
    if path not in ("/release_memory_occupation", "/resume_memory_occupation", "/sleep", "/wake_up"):
        return NOTHING
    asked = parse_qs(query.decode("latin-1"))
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
    "/pause": Effect((GENERATION,)),
    "/continue_generation": Effect(continues=(GENERATION,)),
    "/resume": Effect(continues=(GENERATION,)),
    "/flush_cache": Effect(forgets=True),
    "/reset_prefix_cache": Effect(forgets=True),
}
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
    """Return what a body says; nothing if it is long, or no JSON object: the engine will say so."""
    if not body or len(body) > _MOST_READ:
        return _Said()
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


def pause(context: Context, worker: Worker, effect: Effect) -> tuple[str, ...]:
    """Pause a worker before its engine is asked to do what pauses it; return what it lacks now and did not before.

    From now on no request goes there that the engine could not answer.
    """
    added = tuple(name for name in effect.pauses if name not in worker.paused)
    _set(context, worker, (*worker.paused, *added))
    return added


def learn(context: Context, worker: Worker, effect: Effect) -> None:
    """Take note of what an engine has done."""
    if effect.continues:
        give_back(context, worker, effect.continues)
    if effect.forgets:
        context.forget_prefixes(worker)
    if effect.version:
        for entry in context.fleet.entries(worker.spec.url):
            entry.weights = effect.version


def give_back(context: Context, worker: Worker, names: tuple[str, ...]) -> None:
    """Take note that an engine has these back: it was given them, or has not done what would have taken them."""
    _set(context, worker, tuple(name for name in worker.paused if name not in names))


def _set(context: Context, worker: Worker, paused: tuple[str, ...]) -> None:
    for entry in context.fleet.entries(worker.spec.url):  # all ranks of the engine
        context.fleet.set_paused(entry, tuple(sorted(set(paused))))
