"""Look after a running router from a shell: the commands that show it, and those that change it.

    sglang-router status                      is it ready, how many workers, what is wrong      1: not ready
    sglang-router workers                     a table of all workers
    sglang-router drain WORKER [--wait]       no new requests; with --wait, until none is in flight
    sglang-router resume WORKER               takes requests again
    sglang-router add URL [--wait]            registers a worker; with --wait, until it is healthy
    sglang-router remove WORKER [--wait]      with --wait it is drained first
    sglang-router restart WORKER | --all [--wait]      engines that `serve` runs
    sglang-router config [--all]              the options in effect, and where each comes from
    sglang-router reload                      read the configuration again

A WORKER is its URL or its id. Each command is a row of `COMMANDS`: its options, and what it does, which returns the
answer of the router, the lines for people, and the exit status. `asking` says what the statuses mean.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from sglang_router.commands.answers import (
    AcceptedAnswer,
    AddedWorker,
    ChangedWorker,
    ConfigAnswer,
    ReloadAnswer,
    RollingAnswer,
    WorkerAnswer,
    WorkersAnswer,
)
from sglang_router.commands.asking import REFUSED, TOO_LATE, UNREADABLE, Door, Failed, door_of, new_parser, quoted
from sglang_router.commands.describing import (
    in_flight,
    option_lines,
    reload_lines,
    state_of,
    status_lines,
    worker_lines,
)
from sglang_router.commands.other_routers import OtherRouters
from sglang_router.commands.printable import pretty, shown
from sglang_router.config.flags import OptionParser
from sglang_router.config.urls import parse_worker_url
from sglang_router.errors import ConfigError
from sglang_router.words import counted

_EVERY = 0.25
"""Seconds between two looks while a command waits."""


class CommandResult(NamedTuple):
    """What a command has found. answer: for programs; lines: for people."""

    answer: Any
    lines: Iterable[str]
    status: int = 0


Run = Callable[[Door, argparse.Namespace], CommandResult]


class Command(NamedTuple):
    """One command. about: in a sentence; options: adds its own."""

    about: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Run


def main(name: str, words: Sequence[str], prog: str) -> int:
    """Run a command; return its exit status. Raises: ConfigError, when the command line cannot be used."""
    options = parser(name, prog).parse_all(words)
    door = door_of(options)
    try:
        result = COMMANDS[name].run(door, options)
    except Failed as failed:
        print("error:", failed, file=sys.stderr)
        return failed.status
    print(pretty(msgspec.json.encode(result.answer)) if options.json else "\n".join(result.lines))
    return result.status


def parser(name: str, prog: str) -> OptionParser:
    """Return the parser of a command."""
    command = COMMANDS[name]
    made = new_parser(prog, command.about)
    command.options(made)
    return made


# -- options -----------------------------------------------------------------------------------------------------------


def _none(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def _worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("worker", metavar="WORKER", help="URL of the worker, or its id")


def _waiting(parser: argparse.ArgumentParser, until: str) -> None:
    parser.add_argument("--wait", action="store_true", help=f"wait until {until}")
    parser.add_argument(
        "--timeout", type=_seconds, default=3600.0, metavar="SECONDS", help="how long to wait at most; default: 3600"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _to_drain(parser: argparse.ArgumentParser) -> None:
    _worker(parser)
    _waiting(parser, "it has no request in flight")


def _to_remove(parser: argparse.ArgumentParser) -> None:
    _worker(parser)
    _waiting(parser, "it has no request in flight, and drain it before")


def _to_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("worker", metavar="URL", help="base URL of the worker, such as http://10.0.0.1:8000")
    parser.add_argument("--role", choices=("regular", "prefill", "decode"), default="regular", help="what it does")
    parser.add_argument("--bootstrap-port", type=int, metavar="N", help="of a prefill worker")
    parser.add_argument("--model", metavar="NAME", help="its model; by default what its engine says")
    about = "file with the key that the router sends to it (`ps` would show a key on the command line)"
    parser.add_argument("--worker-api-key-file", metavar="FILE", help=about)
    _waiting(parser, "it is healthy")


def _to_restart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("worker", metavar="WORKER", nargs="?", help="URL of the worker, or its id")
    parser.add_argument("--all", action="store_true", help="all engines, one after the other, so that no request fails")
    _waiting(parser, "it takes requests again")


def _to_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also the options that have their default")


# -- what they do ------------------------------------------------------------------------------------------------------


def _status(door: Door, options: argparse.Namespace) -> CommandResult:
    answer = door.ask("GET", "/readiness")
    try:
        readiness = msgspec.json.decode(answer.content, type=dict[str, Any])
    except UNREADABLE:
        raise door.refused(answer) from None
    if "total_workers" not in readiness:
        raise door.refused(answer)
    version, workers = door.get("/version", dict[str, Any]), _workers_of(door)
    readiness |= _shared(door, readiness)
    found = {**version, **readiness, "workers": workers, "policy": _policy(door)}
    lines = status_lines(door.shown, version, readiness, workers, found["policy"])
    return CommandResult(found, lines, 0 if readiness.get("status") == "ready" else REFUSED)


def _shared(door: Door, readiness: dict[str, Any]) -> dict[str, Any]:
    """Return how the router shares its knowledge with others, more fully than it tells everybody; {} if it does not, or
    to who may not read it."""
    reply = door.ask("GET", "/overview") if "shared_state" in readiness else None
    if reply is None or reply.status != 200:
        return {}
    found = msgspec.json.decode(reply.content, type=dict[str, Any]).get("shared")
    return {"shared_state": found} if found else {}


def _policy(door: Door) -> str:
    """Return the policy in effect; "" of a router that does not tell its options."""
    reply = door.ask("GET", "/config")
    if reply.status != 200:
        return ""
    found = door.decoded(reply, ConfigAnswer)
    return next((str(each.get("value")) for each in found.get("options", []) if each.get("name") == "policy"), "")


def _workers(door: Door, options: argparse.Namespace) -> CommandResult:
    workers = _workers_of(door)
    return CommandResult(workers, worker_lines(workers))


def _workers_of(door: Door) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = door.get("/workers", WorkersAnswer).get("workers", [])
    return found


def _drain(door: Door, options: argparse.Namespace) -> CommandResult:
    found = _drained(door, options) if options.wait else _change(door, options.worker, "drain")
    left = in_flight(found)
    about = f"{counted(left, 'request')} in flight" if left else "no request is in flight"
    return CommandResult(found, [f"{shown(str(found['url']))} gets no new requests; {about}"])


def _drained(door: Door, options: argparse.Namespace) -> dict[str, Any]:
    """Drain a worker and wait until it has no request in flight, at this router and at those that share with it."""
    found = _change(door, options.worker, "drain")
    others = OtherRouters(door)
    said = ""

    def missing(worker: dict[str, Any]) -> str:
        nonlocal said
        why = others.missing(time.monotonic())
        if others.unreached and why != said:  # whoever waits should know, for that may last
            said = why
            print(f"waiting: {shown(f'{options.worker} {why}')}", file=sys.stderr)
        return "has requests in flight" if in_flight(worker) else why

    return _wait(door, f"/workers/{quoted(found['id'])}", options, missing, found)


def _resume(door: Door, options: argparse.Namespace) -> CommandResult:
    found = _change(door, options.worker, "resume")
    state, why = state_of(found)
    about = "" if state == "healthy" else f", but it is {state}{f': {why}' if why else ''}"
    return CommandResult(found, [shown(f"{found['url']} takes requests again{about}")])


def _add(door: Door, options: argparse.Namespace) -> CommandResult:
    body: dict[str, Any] = {"url": parse_worker_url(options.worker), "worker_type": options.role}
    body |= {"bootstrap_port": options.bootstrap_port} if options.bootstrap_port is not None else {}
    body |= {"model_id": options.model} if options.model is not None else {}
    if options.worker_api_key_file is not None:
        body["api_key"] = _key(options.worker_api_key_file)
    found = door.decoded(door.ask("POST", "/workers", body), AddedWorker)
    others = _others(str(found.get("message", "")))
    if not options.wait:
        about = "is registered, and takes requests once it is healthy (--wait waits for that)"
        return CommandResult(found, [f"{shown(body['url'])} {about}{others}"])
    path = f"/workers/{quoted(found['worker_id'])}"
    found = _wait(door, path, options, lambda each: "" if each.get("is_healthy") else "is not healthy", {})
    return CommandResult(found, [f"{shown(body['url'])} is healthy and takes requests{others}"])


def _others(message: str) -> str:
    """Return what a router's answer says of the other routers of its fleet, to follow a sentence; "" for nothing."""
    _, separator, told = message.partition("; ")
    return separator + shown(told)


def _key(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--worker-api-key-file {path}: {getattr(error, 'strerror', '') or error}") from None


def _remove(door: Door, options: argparse.Namespace) -> CommandResult:
    if options.wait:
        _drained(door, options)
    if "://" in options.worker:  # also all ranks of an engine
        reply = door.ask("POST", f"/remove_worker?url={quote(options.worker, safe='')}")
        if reply.status >= 400 or not reply.content.startswith(b"Successfully removed worker"):
            raise door.refused(reply)
        return CommandResult(
            {"status": "removed", "url": options.worker},
            [f"{shown(options.worker)} is removed{_others(reply.content.decode(errors='replace'))}"],
        )
    found = door.decoded(door.ask("DELETE", f"/workers/{quoted(options.worker)}"), AcceptedAnswer)
    return CommandResult(found, [shown(found["message"])])


def _restart(door: Door, options: argparse.Namespace) -> CommandResult:
    if options.all == (options.worker is not None):
        raise ConfigError("give one WORKER, or --all")
    if options.all:
        found = door.decoded(door.ask("POST", "/restart_workers"), RollingAnswer)
        if options.wait:
            found = _wait(door, "/restart_workers", options, _runs, found, RollingAnswer)
        told = f"{found['state']}: {found['done']} of {found['total']} engines are restarted"
        why = f"; {found['reason']}" if found.get("reason") else ""
        return CommandResult(found, [shown(told + why)], REFUSED if found["state"] == "stopped" else 0)
    path = f"/workers/{quoted(options.worker)}"
    before = _restarts(door.get(path, WorkerAnswer))
    found = door.decoded(door.ask("POST", f"{path}/restart"), AcceptedAnswer)
    if not options.wait:
        return CommandResult(found, [f"{shown(options.worker)} is drained and then restarted"])

    def missing(worker: dict[str, Any]) -> str:
        if worker.get("health") == "down":
            why = (worker.get("replica") or {}).get("reason") or "its process is gone"
            raise Failed(REFUSED, shown(f"{options.worker} is down and is not started again: {why}"))
        return "" if _restarts(worker) > before and state_of(worker)[0] == "healthy" else "restarts"

    found = _wait(door, path, options, missing, {})
    return CommandResult(found, [f"{shown(options.worker)} is restarted and takes requests"])


def _runs(rolling: dict[str, Any]) -> str:
    """Return "" when a rolling restart has ended."""
    return "runs" if rolling["state"] == "running" else ""


def _restarts(worker: dict[str, Any]) -> int:
    """Return how often the engine of a worker was restarted."""
    return int((worker.get("replica") or {}).get("restarts", 0))


def _config(door: Door, options: argparse.Namespace) -> CommandResult:
    found = door.get("/config", ConfigAnswer)
    return CommandResult(found, option_lines(found.get("options") or [], options.all))


def _reload(door: Door, options: argparse.Namespace) -> CommandResult:
    found = door.decoded(door.ask("POST", "/reload"), ReloadAnswer)
    return CommandResult(found, reload_lines(found))


def _change(door: Door, worker: str, what: str) -> dict[str, Any]:
    found: dict[str, Any] = door.decoded(door.ask("POST", f"/workers/{quoted(worker)}/{what}"), ChangedWorker)
    return found


def _wait(
    door: Door,
    path: str,
    options: argparse.Namespace,
    missing: Callable[[dict[str, Any]], str],
    found: dict[str, Any],
    shape: type[msgspec.Struct] = WorkerAnswer,
) -> dict[str, Any]:
    """Ask until nothing is missing; return the last answer, which has a shape. found: an answer to begin with, or {}.

    missing  says of an answer what is, in words that follow "it still"

    Raises: Failed, when it takes too long.
    """
    until = time.monotonic() + options.timeout
    still = "does not answer"
    while not found or (still := missing(found)):
        if time.monotonic() > until:
            why = f": {shown(str(found['last_error']))}" if found.get("last_error") else ""
            raise Failed(TOO_LATE, f"after {options.timeout:g} s it still {shown(still)}{why}.")
        time.sleep(_EVERY if found else 0.0)
        found = door.get(path, shape)
    return found


COMMANDS: dict[str, Command] = {
    "status": Command("Show whether the router is ready, and what is wrong.", _none, _status),
    "workers": Command("Show all workers, with state, load and the reason of what is wrong.", _none, _workers),
    "drain": Command("Send a worker no new requests; it keeps its cached prefixes.", _to_drain, _drain),
    "resume": Command("End the drain of a worker.", _worker, _resume),
    "add": Command("Register a worker.", _to_add, _add),
    "remove": Command("Remove a worker; its requests in flight finish.", _to_remove, _remove),
    "restart": Command("Restart engines that `sglang-router serve` runs.", _to_restart, _restart),
    "config": Command("Show the options in effect and where each value comes from.", _to_show, _config),
    "reload": Command("Read the configuration again: the file of --config, keys, certificates.", _none, _reload),
}
