"""Check deploy/grafana and deploy/prometheus with a real Prometheus that scrapes a loaded router.

    clients ──> router (TLS, traces, limits) ──> 2 built-in engines
                  '── metrics port <── Prometheus, with the alerts of deploy/ <── each expression of the dashboard

1. promtool reads the rules and the scrape configuration, runs the rules' own tests, and reads what the router exports.
2. After some seconds of traffic each expression of the dashboard and of docs/monitoring.md must have a value, and each
   metric of an alert.
3. A worker is killed: its alert must fire. For that, the waiting times of the alerts are cut to a second.

`scripts/test-monitoring` (a shell script) runs it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from engines import end_engine, engine_processes, start_engine, wait_until_healthy
from routers import RouterProcess, free_port, router_process

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus"
ENGINE = ("--max-running-requests", "4", "--decode-base-ms", "5")
KEY = "monitoring-key"
WITHIN = 90.0
TRAFFIC = 20.0
"""Seconds of traffic before the expressions are asked for the first time."""
RATE = "20s"
"""Stands for Grafana's $__rate_interval."""
_NAME = re.compile(r"\b(?:sgl_router|smg)_\w+")


class Failure(Exception):
    """Something is not as it should be."""


def say(text: str) -> None:
    print(text, flush=True)


def run(*words: str | Path, text: str | None = None) -> str:
    """Run a command; return what it says. Raises: Failure, when it fails."""
    done = subprocess.run([*map(str, words)], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


# -- the files -------------------------------------------------------------------------------------------------------


def expressions() -> list[tuple[str, str]]:
    """Return panel and expression of all panels of the dashboards, their variables replaced."""
    found = []
    for path in sorted((DEPLOY / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].replace("$__rate_interval", RATE).replace("$worker", ".*")
                found.append((panel["title"], expression))
    return found


def documented() -> list[tuple[str, str]]:
    """Return page and expression of all questions of docs/monitoring.md, without what only looks for trouble."""
    page = (ROOT / "docs" / "monitoring.md").read_text("utf-8")
    table = page[page.index("### Questions") : page.index("### Alerts")]
    asked = re.findall(r"`([^`]*sgl_router_[^`]*)`", table)
    plain = (re.sub(r" == \d+$|\{\w+!=[^}]*\}", "", each) for each in asked)
    return [("docs/monitoring.md", each.replace("[5m]", f"[{RATE}]")) for each in plain]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def check_files() -> None:
    """Let promtool read the files and run the tests of the rules; each alert must have one."""
    run("promtool", "check", "rules", RULES / "alerts.yml")
    run("promtool", "check", "config", RULES / "scrape.yml")
    run("promtool", "test", "rules", RULES / "alerts_test.yml")
    tests = yaml.safe_load((RULES / "alerts_test.yml").read_text("utf-8"))["tests"]
    fires = {each["alertname"] for test in tests for each in test["alert_rule_test"] if each.get("exp_alerts")}
    names = {rule["alert"] for rule in alerts()}
    if names - fires:
        raise Failure(f"alerts without a test in which they fire: {sorted(names - fires)}")
    say(f"promtool: {len(names)} alerts are valid, and each fires in its own test")


# -- the traffic -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def traffic(router: RouterProcess) -> Iterator[None]:
    """Send streams, whole answers and mistakes until the block ends."""
    over = threading.Event()

    def client(place: int) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            text = f"Group {place % 4} of clients, who share the beginning of their prompts. " * 20 + f"Turn {turn}."
            body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 12}
            if place % 2:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            with contextlib.suppress(OSError):
                router.post("/v1/chat/completions", b"{no json" if turn % 10 == 0 else body)

    threads = [threading.Thread(target=client, args=(place,), daemon=True) for place in range(10)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(WITHIN)


def certificate(folder: Path) -> tuple[Path, Path, ssl.SSLContext]:
    """Make a certificate for 127.0.0.1; return it, its key, and what trusts it."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", *names, "-out", cert, "-keyout", key)
    return cert, key, ssl.create_default_context(cafile=str(cert))


# -- Prometheus ------------------------------------------------------------------------------------------------------


class Prometheus:
    """A server that scrapes one target every other second, with the alerts of deploy/ without their waiting times."""

    def __init__(self, folder: Path, target: str) -> None:
        rules = yaml.safe_load((RULES / "alerts.yml").read_text("utf-8"))
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule["for"] = "1s"
        (folder / "alerts.yml").write_text(yaml.safe_dump(rules), "utf-8")
        config = yaml.safe_load((RULES / "scrape.yml").read_text("utf-8"))
        config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
        address = f"127.0.0.1:{free_port()}"
        self._url = f"http://{address}"
        self._log = (folder / "prometheus.log").open("wb")
        flags = (f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}")
        self._process = subprocess.Popen(
            ["prometheus", *flags, f"--web.listen-address={address}"], stdout=self._log, stderr=self._log
        )

    def get(self, path: str, **query: str) -> Any:
        url = f"{self._url}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=WITHIN) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """Return the values of an expression now, without those that are no numbers."""
        found = [float(each["value"][1]) for each in self.get("/api/v1/query", query=expression)["result"]]
        return [value for value in found if value == value]

    def fault(self) -> str:
        """Return why the router could not be scraped the last time; "" if it could."""
        return "; ".join(each["lastError"] for each in self.get("/api/v1/targets")["activeTargets"])

    def firing(self) -> set[tuple[str, str]]:
        """Return the alerts that fire, with their workers."""
        found = self.get("/api/v1/alerts")["alerts"]
        return {(a["labels"]["alertname"], a["labels"].get("worker", "")) for a in found if a["state"] == "firing"}

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(WITHIN)
        self._log.close()


def until_none(what: str, missing: Any) -> None:
    """Wait until `missing` returns nothing. Raises: Failure, with what it returned last."""
    deadline = time.monotonic() + WITHIN
    while left := missing():
        if time.monotonic() > deadline:
            raise Failure(f"{what}:\n" + "\n".join(map(str, left)))
        time.sleep(1.0)


# -- the checks ------------------------------------------------------------------------------------------------------


def check_live(folder: Path) -> None:
    cert, key, trusts = certificate(folder)
    away = f"127.0.0.1:{free_port()}"  # no collector and no store there: what is lost then is a metric as well
    flags = (
        *("--tls-cert-path", str(cert), "--tls-key-path", str(key), "--api-key", f"alice {KEY}"),
        *("--max-concurrent-requests", "6", "--queue-size", "100", "--engine-report-interval-secs", "1"),
        *("--health-check-interval-secs", "1", "--enable-trace", "--otlp-traces-endpoint", away),
        *("--autoscale", "2:2", "--shared-state", f"redis://{away}"),
    )
    doomed, doomed_url = start_engine(*ENGINE)
    try:
        wait_until_healthy(doomed_url)
        with (
            engine_processes(1, *ENGINE) as urls,
            router_process([*urls, doomed_url], *flags, key=KEY, tls=trusts) as router,
        ):
            prometheus = Prometheus(folder, urllib.parse.urlsplit(router.metrics_url).netloc)
            try:
                with traffic(router):
                    time.sleep(TRAFFIC)
                    check_dashboard(prometheus)
                    exposition = urllib.request.urlopen(router.metrics_url, timeout=WITHIN).read().decode()
                    report = faults_of(exposition)
                    say(f"promtool check metrics: {len(exposition.splitlines())} lines, {len(report)} faults")
                    for fault in report:
                        say(f"  {fault}")
                check_alert(prometheus, doomed, doomed_url)
            finally:
                prometheus.end()
    finally:
        end_engine(doomed)


def faults_of(exposition: str) -> list[str]:
    """Return what promtool finds fault with in names that are ours alone."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 3):  # 3: only names that could be better
        raise Failure(f"promtool cannot read the metrics:\n{done.stderr}")
    return [line for line in done.stderr.splitlines() if line]


def check_dashboard(prometheus: Prometheus) -> None:
    asked = expressions() + documented()
    named = {name for rule in alerts() for name in _NAME.findall(rule["expr"])}

    def missing() -> list[str]:
        empty = [f"{panel}: {expression}" for panel, expression in asked if not prometheus.values(expression)]
        empty += [f"alerts: {name}" for name in sorted(named) if not prometheus.values(name)]
        fault = prometheus.fault() if empty else ""
        return empty + [f"the last scrape failed: {fault}"] * bool(fault)

    until_none("without a value", missing)
    say(f"Prometheus: {len(asked)} expressions of dashboard and page have values, and {len(named)} metrics of alerts")


def check_alert(prometheus: Prometheus, engine: subprocess.Popen[str], url: str) -> None:
    wanted = ("RouterWorkerUnhealthy", url)
    if wanted in prometheus.firing():
        raise Failure(f"{wanted} fires before the worker is killed")
    began = time.monotonic()
    engine.kill()
    engine.wait(WITHIN)
    until_none("does not fire", lambda: [] if wanted in prometheus.firing() else [wanted])
    say(f"Prometheus: RouterWorkerUnhealthy fires {time.monotonic() - began:.0f} s after its worker was killed")


def main() -> int:
    lacking = [tool for tool in ("prometheus", "promtool", "openssl") if shutil.which(tool) is None]
    if lacking:
        say(f"missing: {', '.join(lacking)} (Debian: apt-get install prometheus openssl)")
        return 2
    try:
        check_files()
        with tempfile.TemporaryDirectory(prefix="monitoring-") as folder:
            check_live(Path(folder))
    except Failure as failure:
        say(f"FAILED: {failure}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
