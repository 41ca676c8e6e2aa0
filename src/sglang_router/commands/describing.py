"""Say in words what the control plane tells of the router and its workers. No I/O.

The answers are read as mappings, for a command may be older or newer than the router that it asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sglang_router.commands.printable import shown
from sglang_router.commands.tables import duration, size, table
from sglang_router.words import counted

WORKER_HEAD: Final = ("worker", "model", "role", "state", "in flight", "waiting", "processed", "prefixes", "age", "why")
WORKER_RIGHT: Final = ("in flight", "waiting", "processed", "prefixes", "age")

Facts = Mapping[str, Any]


def state_of(worker: Facts) -> tuple[str, str]:
    """Return the state of a worker in one word, and why it is so."""
    error = str(worker.get("last_error") or "")
    replica = worker.get("replica") or {}
    if worker.get("draining"):
        return "draining", counted(in_flight(worker), "request") + " in flight"
    if worker.get("withheld"):
        return "withheld", str(worker["withheld"])
    if worker.get("paused"):
        return "paused", f"by the control plane: {', '.join(worker['paused'])}"
    if worker.get("health") != "healthy":
        return str(worker.get("health", "unknown")), error or str(replica.get("reason") or "")
    if worker.get("held_off"):
        return "ejected", str(worker["held_off"])
    if worker.get("circuit_breaker") in ("open", "half_open"):
        return "breaker " + str(worker["circuit_breaker"]).replace("_", " "), error
    return "healthy", ""


def in_flight(worker: Facts) -> int:
    """Return the requests at a worker: of this router, and of those that share with it what they know."""
    return int(worker.get("load", 0)) + int(worker.get("elsewhere", 0))


def worker_lines(workers: Sequence[Facts]) -> Iterator[str]:
    """Yield a table of workers."""
    if not workers:
        yield "no workers: add one with `sglang-router add URL`"
        return
    yield from table(WORKER_HEAD, [worker_row(each) for each in workers], WORKER_RIGHT)


def worker_row(worker: Facts) -> list[str]:
    """Return the cells of a worker."""
    state, why = state_of(worker)
    cells = [
        str(worker.get("url", "?")),
        str(worker.get("model_id", "")),
        str(worker.get("worker_type", "")).replace("regular", ""),
        state,
        str(worker.get("load", "")),
        str(worker.get("waiting") or ""),
        str(worker.get("processed", "")),
        size(worker["tree_size"]) if worker.get("tree_size") else "",
        duration(worker.get("registered_secs", 0.0)),
        why,
    ]
    return [shown(cell) for cell in cells]


def status_lines(url: str, version: Facts, readiness: Facts, workers: Sequence[Facts], policy: str) -> Iterator[str]:
    """Yield what `status` prints."""
    kind = f"{version.get('version', '?')} ({version.get('build', '?')})"
    yield f"router     {url}, version {shown(kind)}"
    why = readiness.get("reason")
    yield f"ready      {'yes' if readiness.get('status') == 'ready' else 'no'}{f': {shown(str(why))}' if why else ''}"
    if policy:
        yield f"policy     {shown(policy)}"
    states: dict[str, int] = {}
    for each in workers:
        state = state_of(each)[0]
        states[state] = states.get(state, 0) + 1
    kinds = ", ".join(f"{number} {shown(state)}" for state, number in sorted(states.items()))
    yield f"workers    {len(workers)}{f': {kinds}' if kinds else ''}"
    yield f"in flight  {counted(sum(int(each.get('load', 0)) for each in workers), 'request')}"
    if isinstance(shared := readiness.get("shared_state"), Mapping):
        yield f"fleet      {shared_line(shared)}"
    for each in workers:
        state, reason = state_of(each)
        if state != "healthy":
            yield f"  {shown(str(each.get('url')))} is {shown(state)}{f': {shown(reason)}' if reason else ''}"


def shared_line(shared: Facts) -> str:
    """Return how a router shares its knowledge with others, in one line."""
    if shared.get("state") == "connected":
        store = f" through {shown(str(shared['store']))}" if shared.get("store") else ""
        return counted(int(shared.get("peers", 0)), "other router") + store
    return shown(f"alone: {shared.get('problem') or shared.get('state')}")


def option_lines(options: Sequence[Facts], everything: bool) -> Iterator[str]:
    """Yield a table of options in effect: those that somebody set, or all."""
    chosen = [each for each in options if everything or each.get("origin") != "default"]
    if not chosen:
        yield "every option has its default; --all shows them"
        return
    rows = [[shown(cell) for cell in _option(each)] for each in chosen]
    yield from table(("option", "value", "from", "on a change"), rows)


def _option(option: Facts) -> list[str]:
    where, origin = str(option.get("where", "")), str(option.get("origin", ""))
    place = "" if origin in ("default", "flag") else f" {where}"
    return [
        str(option.get("flag", "")),
        value_text(option.get("value")),
        f"{origin}{place}",
        "reload" if option.get("reload") else "restart",
    ]


def value_text(value: object) -> str:
    """Return the value of an option in one line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(value_text, value))
    if isinstance(value, Mapping):
        return " ".join(f"{key}={value_text(each)}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def reload_lines(report: Facts) -> Iterator[str]:
    """Yield what `reload` prints."""
    changed, waiting = report.get("changed") or [], report.get("needs_restart") or []
    yield f"in effect now: {shown(', '.join(changed))}" if changed else "nothing changed"
    for what in ("added", "removed"):
        for url in report.get(what) or []:
            yield f"  {what} {shown(str(url))}"
    if waiting:
        yield f"these changes need a restart: {shown(', '.join(waiting))}"
    if not report.get("file"):
        yield "the router was started without --config: only keys and certificates were read again"
