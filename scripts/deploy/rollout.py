"""A rolling update of the router under load, with the lifecycle of pods played as Kubernetes does.

    clients ──> Balancer (kube-proxy: hears of endpoints late) ──> routers, a process for each pod ──> 2 engines

    Pod           kubelet: probes as the manifest says; ready when they hold. Deleted: no endpoint any more, SIGTERM at
                  the same time, SIGKILL after terminationGracePeriodSeconds
    Deployment    its controller: as many new pods as maxSurge lets it; an old one is deleted when a new one has been
                  ready for minReadySeconds

Options, probes and times are those of the chart's Deployment and ConfigMap; only addresses and workers differ. No
kubelet and no network of pods are needed, so this runs anywhere.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from scripts import reporting
from scripts.deploy import chart
from scripts.deploy.balancer import Balancer, Place
from scripts.deploy.load import Clients
from scripts.deploy.manifests import configuration, container
from scripts.deploy.report import Failure, Report
from scripts.kubernetes.link import Background

from engines import engine_processes
from routers import free_port

WITHIN = 120.0
_addresses = (f"127.0.{net}.{host}" for net in itertools.count(70) for host in range(1, 250))


class Result(NamedTuple):
    """served, failed: requests; seconds: of the update; slowest_end: seconds from SIGTERM to the end of a router."""

    served: int
    failed: int
    seconds: float
    slowest_end: float


class Pod:
    """One pod; see the module. ready, terminating: as its status says."""

    def __init__(self, manifest: _Manifest, workers: list[str], folder: Path, changed: Callable[[], None]) -> None:
        self.ready = False
        self.terminating = False
        self.ready_since = 0.0
        self.place: Place = (next(_addresses), manifest.port)
        self._manifest = manifest
        self._changed = changed
        self._over = threading.Event()
        self.log = folder / f"{self.place[0]}.log"
        options = manifest.options | {
            "worker-urls": workers,
            "port": manifest.port,
            "prometheus-port": manifest.port + 1,
        }
        config = folder / f"{self.place[0]}.yaml"
        config.write_text(yaml.safe_dump(options))
        words = [sys.executable, "-m", "sglang_router", "launch", "--config", str(config), "--host", self.place[0]]
        words += ["--prometheus-host", self.place[0]]
        with self.log.open("wb") as sink:
            environment = {**os.environ, "PYTHONPATH": str(reporting.ROOT / "src")}
            self.process = subprocess.Popen(words, stdout=sink, stderr=sink, env=environment)
        self._kubelet = threading.Thread(target=self._probe, daemon=True)
        self._kubelet.start()

    def _probe(self) -> None:
        """Ask as the kubelet does: first the startup probe, then readiness, until the pod ends."""
        probes = self._manifest.container
        if not self._holds(probes["startupProbe"], probes["startupProbe"]["failureThreshold"]):
            return
        failures = 0
        probe = probes["readinessProbe"]
        while not self._over.wait(probe["periodSeconds"]):
            failures = 0 if self._answers(probe) else failures + 1
            ready = not failures if not self.ready else failures < probe["failureThreshold"]
            if ready != self.ready:
                self.ready, self.ready_since = ready, time.monotonic()
                self._changed()

    def _holds(self, probe: dict[str, Any], tries: int) -> bool:
        return any(self._answers(probe) or self._over.wait(probe["periodSeconds"]) for _ in range(tries))

    def _answers(self, probe: dict[str, Any]) -> bool:
        connection = http.client.HTTPConnection(*self.place, timeout=probe["timeoutSeconds"])
        try:
            connection.request("GET", probe["httpGet"]["path"])
            return 200 <= connection.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def delete(self) -> float:
        """Delete the pod; return how many seconds its router took to end. Raises: Failure."""
        self.terminating = True
        self._changed()
        began = time.monotonic()
        self.process.terminate()
        try:
            status = self.process.wait(self._manifest.grace)
        except subprocess.TimeoutExpired:
            raise Failure(
                f"a router had not ended after terminationGracePeriodSeconds ({self._manifest.grace})"
            ) from None
        finally:
            self.kill()
        if status:
            raise Failure(f"a router ended with status {status}:\n{self.log.read_text(errors='replace')[-2000:]}")
        return time.monotonic() - began

    def kill(self) -> None:
        self._over.set()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._kubelet.join(10)


class _Manifest:
    """What the chart says of its pods."""

    def __init__(self, *sets: str) -> None:
        documents = chart.documents(chart.rendered(*sets))
        (deployment,) = (each["spec"] for each in documents if each["kind"] == "Deployment")
        self.port = free_port()
        self.container = container(documents)
        self.grace: float = deployment["template"]["spec"]["terminationGracePeriodSeconds"]
        self.replicas: int = deployment["replicas"]
        self.settles: float = deployment["minReadySeconds"]
        self.surge: int = deployment["strategy"]["rollingUpdate"]["maxSurge"]
        self.spare: int = deployment["strategy"]["rollingUpdate"]["maxUnavailable"]
        options = configuration(documents)
        self.options = {
            name: value for name, value in options.items() if "discovery" not in name and name != "selector"
        }


class Deployment:
    """Its controller, and that of the endpoints; see the module."""

    def __init__(self, manifest: _Manifest, workers: list[str], folder: Path, balancer: Balancer) -> None:
        self._manifest = manifest
        self._workers = workers
        self._folder = folder
        self._balancer = balancer
        self._lock = threading.Lock()
        self._pods: list[Pod] = []
        self.pods: list[Pod] = []

    def _changed(self) -> None:
        """Tell the balancer which pods are endpoints."""
        with self._lock:
            self._balancer.follow([pod.place for pod in self._pods if pod.ready and not pod.terminating])

    def _start(self) -> Pod:
        pod = Pod(self._manifest, self._workers, self._folder, self._changed)
        with self._lock:
            self._pods.append(pod)
        return pod

    def create(self) -> None:
        """Start all replicas; return when they are available."""
        self.pods = [self._start() for _ in range(self._manifest.replicas)]
        self._until_available(self.pods)

    def _until_available(self, pods: list[Pod]) -> None:
        deadline = time.monotonic() + WITHIN
        while not all(pod.ready and time.monotonic() - pod.ready_since >= self._manifest.settles for pod in pods):
            for pod in pods:
                if pod.process.poll() is not None or time.monotonic() > deadline:
                    raise Failure(f"a router does not get ready:\n{pod.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def until_known(self) -> None:
        """Wait until clients' connections go to all pods. Raises: Failure."""
        deadline = time.monotonic() + WITHIN
        while len(self._balancer.places) < len(self.pods):
            if time.monotonic() > deadline:
                raise Failure(f"the balancer does not learn of the pods: {self._balancer.places}")
            time.sleep(0.05)

    def update(self) -> float:
        """Replace all pods; return the most seconds that one took to end. Raises: Failure."""
        if (self._manifest.surge, self._manifest.spare) != (1, 0):
            raise Failure("this plays maxSurge 1 and maxUnavailable 0 only: the chart has others")
        slowest = 0.0
        for old in list(self.pods):
            new = self._start()
            self._until_available([new])
            self.pods.append(new)
            self.pods.remove(old)
            slowest = max(slowest, old.delete())
        return slowest

    def close(self) -> None:
        for pod in self._pods:
            pod.kill()


@contextlib.contextmanager
def _service(*sets: str) -> Iterator[tuple[Deployment, Balancer]]:
    background = Background()
    with tempfile.TemporaryDirectory(prefix="test-deploy-") as place:
        try:
            balancer = Balancer(background)
            with engine_processes(2, "--decode-base-ms", "15") as workers:
                deployment = Deployment(_Manifest(*sets), workers, Path(place), balancer)
                try:
                    yield deployment, balancer
                finally:
                    deployment.close()
        finally:
            background.close()


def measure(*sets: str, updates: int = 1) -> tuple[Result, str]:
    """Update the Deployment so often under load; return what came of it, and the failures in words. Raises: Failure."""
    with _service(*sets) as (deployment, balancer):
        deployment.create()
        deployment.until_known()
        with Clients(balancer.port) as clients:
            clients.until_served()
            began = time.monotonic()
            slowest = max(deployment.update() for _ in range(updates))
            seconds = time.monotonic() - began
            clients.until_served()
        failures = clients.failures()
        return Result(clients.served(), failures.total(), seconds, slowest), str(dict(failures.most_common(5)))


def check(report: Report, updates: int = 2) -> None:
    """Run all of it. Raises: Failure, Missing."""
    result, failures = measure(updates=updates)
    told = f"{result.served} requests, {result.failed} failed, in {result.seconds:.0f} s"
    told += f"; a router ended within {result.slowest_end:.0f} s"
    if result.failed:
        raise Failure(f"{updates} rolling updates: {told}: {failures}")
    report.ok(f"{updates} rolling updates of 2 replicas under load, as Kubernetes does them: {told}")
    result, failures = measure("drainSeconds=0")
    if not result.failed:
        raise Failure("without a drain no request failed: this test would not notice a router that ends too soon")
    report.ok(
        f"the same without a drain, to see that this notices: {result.failed} of {result.served + result.failed} failed"
    )
