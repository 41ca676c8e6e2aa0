"""What is done with the units, inside of the namespaces where systemd runs (units.py). Prints a line for what held."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from scripts.deploy.load import Clients

from engines import end_engine, start_engine

SERVICE = "sglang-router.service"
SOCKET = "sglang-router.socket"
CONFIG = Path("/etc/sglang-router/router.yaml")
ENVIRONMENT = Path("/etc/sglang-router/environment")
PORT = 30000
WITHIN = 60.0
RESTARTS = 2


class Failed(Exception):
    """Something is not as it should be."""


def systemctl(*words: str, ok: bool = True) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    if (done.returncode == 0) != ok:
        log = subprocess.run(["journalctl", "--no-pager", "--lines=30"], capture_output=True, text=True, check=False)
        raise Failed(f"systemctl {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}\n{log.stdout}")
    return done.stdout.strip()


def fact(name: str, unit: str = SERVICE) -> str:
    return systemctl("show", "--value", "--property", name, unit)


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN
    while not holds():
        if time.monotonic() > deadline:
            raise Failed(f"not within {WITHIN:g} s: {what}")
        time.sleep(0.05)


def get(path: str) -> tuple[int, Any]:
    """Ask the router; (0, None) without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if path == "/config" else content
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


def policy() -> str:
    _, answer = get("/config")
    return next((str(each["value"]) for each in answer["options"] if each["name"] == "policy"), "")


def write(**options: object) -> None:
    """Change options of the file; None removes one."""
    known = yaml.safe_load(CONFIG.read_text()) | options
    CONFIG.write_text(yaml.safe_dump({name: value for name, value in known.items() if value is not None}))


def say(what: str) -> None:
    print(what, flush=True)


@contextmanager
def load() -> Iterator[Clients]:
    """Yield clients that go on meanwhile; no request of theirs may fail. Raises: Failed."""
    with Clients(PORT) as clients:
        clients.until_served()
        yield clients
        clients.until_served()
    if clients.failures():
        raise Failed(f"requests failed: {dict(clients.failures())}")


def starts() -> None:
    systemctl("start", SERVICE)
    if get("/liveness")[0] != 200:
        raise Failed("`systemctl start` returned before the router serves")
    until("ready", lambda: get("/readiness")[0] == 200)
    say("systemctl start returns when the router serves (Type=notify), with all restrictions in force")


def reloads() -> None:
    with load():
        write(policy="round_robin")
        systemctl("reload", SERVICE)
        until("the new policy", lambda: policy() == "round_robin")
        CONFIG.write_text(CONFIG.read_text() + "polciy: cost\n")
        systemctl("reload", SERVICE, ok=False)
        if policy() != "round_robin":
            raise Failed("a configuration with a mistake took effect")
        write(polciy=None, policy="cache_aware")
        systemctl("reload", SERVICE)
    say("systemctl reload changes the policy under load; it fails, and changes nothing, when the file has a mistake")


def survives() -> None:
    before = fact("MainPID")
    systemctl("kill", "--signal=KILL", SERVICE)
    until("another process", lambda: fact("MainPID") not in (before, "0") and get("/liveness")[0] == 200)
    folder = Path("/run/systemd/system/sglang-router.service.d")
    folder.mkdir(parents=True)
    (folder / "watchdog.conf").write_text("[Service]\nWatchdogSec=2\n")
    systemctl("daemon-reload")
    systemctl("restart", SERVICE)
    until("ready", lambda: get("/readiness")[0] == 200)
    before = fact("MainPID")
    time.sleep(4)  # twice the watchdog's time: the duration for which it lives, not a wait for an event
    if fact("MainPID") != before:
        raise Failed("the watchdog has taken a router that lives for dead")
    systemctl("kill", "--signal=STOP", SERVICE)
    until("the watchdog", lambda: fact("MainPID") not in (before, "0") and get("/liveness")[0] == 200)
    (folder / "watchdog.conf").unlink()
    systemctl("daemon-reload")
    say("systemd restarts the router after kill -9, and when its event loop does not turn any more (WatchdogSec)")


def refuses() -> None:
    write(polciy="cost")
    systemctl("restart", SERVICE, ok=False)
    until("the end of all tries", lambda: fact("ActiveState") == "failed")
    if fact("ExecMainStatus") != "2":
        raise Failed("a configuration that cannot be used did not end with status 2")
    write(polciy=None)
    systemctl("reset-failed", SERVICE)
    say("a configuration that cannot be used is not tried again and again")


def several() -> None:
    ENVIRONMENT.write_text("SGLANG_ROUTER_RELAY_PROCESSES=2\n")
    systemctl("start", SERVICE)
    until("ready", lambda: get("/readiness")[0] == 200)
    if int(fact("TasksCurrent")) < 4:
        raise Failed("it does not run in several processes")
    with load():
        write(policy="round_robin")
        systemctl("reload", SERVICE)
        until("the new policy", lambda: policy() == "round_robin")
        write(policy=None)
        systemctl("reload", SERVICE)
    systemctl("stop", SERVICE)
    ENVIRONMENT.unlink()
    say("with --relay-processes 2, from /etc/sglang-router/environment, it starts, serves, reloads and stops as well")


def activated() -> None:
    systemctl("start", SOCKET)
    until("the first client starts the service", lambda: get("/readiness")[0] == 200)
    began = time.monotonic()
    with load() as clients:
        for _ in range(RESTARTS):
            systemctl("restart", SERVICE)
            clients.until_served()
        count = clients.served()
    seconds = time.monotonic() - began
    systemctl("stop", SOCKET, SERVICE)
    say(f"socket unit: {RESTARTS} times systemctl restart under load, {count} requests, 0 failed, in {seconds:.0f} s")


def turns() -> None:
    systemctl("start", "sglang-router@a")
    until("ready", lambda: get("/readiness")[0] == 200)
    began = time.monotonic()
    with load() as clients:
        for running in ("b", "a"):
            done = subprocess.run(["sglang-router-turn"], capture_output=True, text=True, check=False)
            if done.returncode or systemctl("is-active", f"sglang-router@{running}") != "active":
                raise Failed(f"sglang-router-turn: {done.stderr}")
            clients.until_served()
        count = clients.served()
    seconds = time.monotonic() - began
    write(polciy="cost")
    done = subprocess.run(["sglang-router-turn"], capture_output=True, text=True, check=False)
    if not done.returncode or get("/readiness")[0] != 200:
        raise Failed("sglang-router-turn to a router that cannot start must leave the old one alone")
    write(polciy=None)
    folder = Path("/run/systemd/system/sglang-router@b.service.d")
    folder.mkdir(parents=True)
    (folder / "fails.conf").write_text("[Service]\nExecStartPre=/bin/false\n")  # Restart= would try it again
    systemctl("daemon-reload")
    done = subprocess.run(["sglang-router-turn"], capture_output=True, text=True, check=False)
    if not done.returncode or fact("ActiveState", "sglang-router@b") not in ("inactive", "failed"):
        raise Failed("sglang-router-turn leaves a router behind that is started again and again")
    systemctl("stop", "sglang-router@a")
    say(f"sglang-router-turn, twice under load: {count} requests, 0 failed, in {seconds:.0f} s")
    say("sglang-router-turn leaves the old router alone when the new one cannot start, and does not try that again")


def main() -> int:
    engines = [start_engine("--port", str(port), "--decode-base-ms", "15") for port in (8001, 8002)]
    try:
        for step in (starts, reloads, survives, refuses, several, activated, turns):
            step()
    except (Failed, TimeoutError) as failure:
        print(failure, file=sys.stderr)
        return 1
    finally:
        for process, _ in engines:
            end_engine(process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
