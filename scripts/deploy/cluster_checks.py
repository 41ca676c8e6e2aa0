"""The chart in a real API server: applied, changed, rolled back, and what its service account may do.

There is no kubelet: pods do not start. The router that uses the service account's token runs here, with the
configuration that the chart has put into the API server.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from scripts.deploy import chart, tools
from scripts.deploy.manifests import EVERYTHING
from scripts.deploy.report import Failure, Missing, Report, run
from scripts.kubernetes.cluster import NAMESPACE, Cluster, NoCluster
from scripts.kubernetes.link import Background, Engines

from routers import COMMAND, RouterProcess, free_port, start_router

POD = "127.0.0.61"
CUSTOM = (
    ("monitoring.coreos.com", "v1", "servicemonitors", "ServiceMonitor"),
    ("monitoring.coreos.com", "v1", "prometheusrules", "PrometheusRule"),
    ("keda.sh", "v1alpha1", "scaledobjects", "ScaledObject"),
)
"""Custom resources of the chart. Their models check what is in them (schemas.py); here the server only stores it."""
POOLS = Path(__file__).with_name("inferencepools.yaml")
EPP = (sys.executable, "-m", "sglang_router", "epp")


def check(report: Report) -> None:
    """Run all of it. Raises: Failure, Missing."""
    with tempfile.TemporaryDirectory(prefix="test-deploy-") as place:
        try:
            with Cluster(Path(place)) as cluster:
                _Course(report, cluster, Path(place)).run()
        except NoCluster as error:
            raise Missing(str(error)) from None


class _Course:
    """What is done with one API server."""

    def __init__(self, report: Report, cluster: Cluster, folder: Path) -> None:
        self._report = report
        self._cluster = cluster
        self._folder = folder
        self._variables = {"KUBECONFIG": cluster.kubeconfig("admin", cluster.port), "HOME": str(folder)}
        self._chart = folder / "chart"
        shutil.copytree(chart.CHART, self._chart)
        about = (self._chart / "Chart.yaml").read_text("utf-8").splitlines(keepends=True)
        # A server that was built without a version calls itself 0.0.0.
        (self._chart / "Chart.yaml").write_text("".join(line for line in about if not line.startswith("kubeVersion")))

    def run(self) -> None:
        self._plain_manifests()
        self._release()
        account = "router-sglang-router"
        self._account(account)
        self._discovery(account)
        self._picker()

    def _kubectl(self, *words: str, text: str | None = None, ok: bool = True) -> str:
        return run([tools.kubectl(), "--namespace", NAMESPACE, *words], text=text, variables=self._variables, ok=ok)

    def _helm(self, *words: str) -> str:
        return run([tools.helm(), "--namespace", NAMESPACE, *words], variables=self._variables)

    def _plain_manifests(self) -> None:
        # The manifests are for Kubernetes 1.27 and later; this server may have no policy/v1 yet.
        text = chart.MANIFESTS.read_text("utf-8")
        if "policy/v1\n" not in self._kubectl("api-versions"):
            text = text.replace("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n")
            text = re.sub(r"^ *unhealthyPodEvictionPolicy: .*\n", "", text, flags=re.MULTILINE)
        told = self._kubectl("apply", "--dry-run=server", "--validate=strict", "--filename", "-", text=text)
        self._kubectl("apply", "--filename", "-", text=text)
        again = self._kubectl("diff", "--filename", "-", text=text)
        if again:
            raise Failure(f"applied twice, the manifests change something:\n{again}")
        self._kubectl("delete", "--filename", "-", text=text)
        count = told.count("(server dry run)")
        self._report.ok(f"kubectl apply of {chart.MANIFESTS.name}: {count} objects, and no difference after")

    def _release(self) -> None:
        for group, version, plural, kind in CUSTOM:
            self._kubectl("apply", "--filename", "-", text=json.dumps(_definition(group, version, plural, kind)))
            self._kubectl("wait", "--for=condition=established", f"crd/{plural}.{group}")
        self._kubectl("apply", "--filename", str(POOLS))
        self._kubectl("wait", "--for=condition=established", "crd/inferencepools.inference.networking.k8s.io")
        self._helm("install", "router", str(self._chart), "--dry-run=server")
        self._helm("install", "router", str(self._chart))
        self._report.ok("helm install, first as a server-side dry run")
        before = self._deployment()["spec"]["template"]
        self._helm("upgrade", "router", str(self._chart))
        if self._deployment()["spec"]["template"] != before:
            raise Failure("an upgrade that changes nothing replaces the pods")
        self._helm("upgrade", "router", str(self._chart), "--set", "config.policy=cost")
        if self._deployment()["spec"]["template"] == before:
            raise Failure("another configuration does not replace the pods")
        self._report.ok("helm upgrade: another configuration replaces the pods, the same one does not")
        sets = [word for value in EVERYTHING for word in ("--set", value)]
        self._helm("upgrade", "router", str(self._chart), *sets)
        if (replicas := self._deployment()["spec"]["replicas"]) != 2:
            raise Failure(f"autoscaling begins with {replicas} routers, and there were 2")
        kinds = "deployment,service,configmap,pdb,hpa,networkpolicy,servicemonitor,prometheusrule,scaledobject"
        found = self._kubectl("get", kinds, "--output", "name").split()
        self._report.ok(f"helm upgrade to everything: {len(found)} objects in the namespace")
        self._kubectl("scale", "deployment/router-sglang-router", "--replicas=4")  # as the HorizontalPodAutoscaler does
        self._helm("upgrade", "router", str(self._chart), *sets, "--set", "config.policy=cost")
        if (replicas := self._deployment()["spec"]["replicas"]) != 4:
            raise Failure(f"an upgrade changes the number of routers, which is the autoscaler's: {replicas}")
        self._report.ok("helm upgrade leaves the number of routers to their autoscaler, from the first one on")
        who = f"system:serviceaccount:{NAMESPACE}:router-sglang-router"
        self._may(who, ("list", "pods", "yes"), ("delete", "pods", "no"), ("get", "secrets", "no"), space="default")
        self._report.ok("with discovery.allNamespaces it may list the pods of other namespaces, and nothing else")
        self._helm("rollback", "router", "1")
        left = set(self._kubectl("get", kinds, "--output", "name").split())
        extra = [name for name in left if "hpa" in name or "horizontal" in name or "networkpolicy" in name]
        if extra or self._kubectl("get", "clusterrole", "--output", "name").count("sglang-router"):
            raise Failure(f"after a rollback there still is {extra}")
        self._report.ok("helm rollback takes away what the upgrade had added")

    def _deployment(self) -> Any:
        return json.loads(self._kubectl("get", "deployment", "router-sglang-router", "--output", "json"))

    def _may(self, who: str, *rows: tuple[str, str, str], space: str = NAMESPACE) -> None:
        """Check what somebody may do in a namespace: rows of verb, what, and yes or no. Raises: Failure."""
        for verb, what, may in rows:
            told = self._kubectl("auth", "can-i", verb, what, "--as", who, "--namespace", space, ok=False).strip()
            if told.partition(" ")[0] != may:
                raise Failure(f"{who} may {verb} {what} in {space}: {told}")

    def _account(self, account: str, *more: tuple[str, str, str]) -> None:
        """Check the rights of a service account, and write its token and a kubeconfig with it. Raises: Failure."""
        who = f"system:serviceaccount:{NAMESPACE}:{account}"
        self._may(
            who,
            *((verb, "pods", "yes") for verb in ("get", "list", "watch")),
            *((verb, "pods", "no") for verb in ("create", "delete", "patch")),
            *(("get", what, "no") for what in ("secrets", "configmaps", "nodes", "deployments")),
            *more,
        )
        self._may(who, ("list", "pods", "no"), space="default")
        refused = subprocess.run(
            [tools.kubectl(), "--kubeconfig", self._kubeconfig(account), "get", "secrets"],
            capture_output=True,
            text=True,
            check=False,
        )
        if refused.returncode == 0 or "forbidden" not in refused.stderr.lower():
            raise Failure(f"the token of {account} reads secrets: {refused.stdout}{refused.stderr}")
        self._report.ok(f"the token of {account} may read pods of its namespace, and nothing else; secrets: 403")

    def _kubeconfig(self, account: str) -> str:
        """Return a kubeconfig with a token of a service account, as a pod gets one."""
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token"
        token = self._cluster.must("POST", path, {"spec": {"expirationSeconds": 3600}})["status"]["token"]
        (self._folder / f"{account}.token").write_text(str(token))
        return self._cluster.kubeconfig(account, self._cluster.port, self._folder / f"{account}.token")

    def _picker(self) -> None:
        """Install a picker beside the router, and let it follow its pool with its own token."""
        with _engine() as port:
            sets = ("mode=epp", f"discovery.port={port}")
            self._helm("install", "picker", str(self._chart), *(word for each in sets for word in ("--set", each)))
            account = "picker-sglang-router"
            pool = f"inferencepools.inference.networking.k8s.io/{account}"
            self._report.ok("helm install of a picker beside the router: the API server accepts its InferencePool")
            # `can-i list` knows no field selector, by which the right to one pool holds: the router proves that below.
            self._account(
                account,
                *(
                    (verb, pool, "yes" if verb in ("get", "list", "watch") else "no")
                    for verb in ("get", "delete", "patch")
                ),
                ("get", "inferencepools.inference.networking.k8s.io/others", "no"),
            )
            self._follow(account, port, EPP, "--epp-port", str(free_port()))
        self._report.ok("with its token and the chart's ConfigMap the picker follows its pool to a pod, and sees it go")

    def _discovery(self, account: str) -> None:
        """Let the router find a pod with its own token."""
        with _engine() as port:
            self._follow(account, port)
        self._report.ok("with its token and the chart's ConfigMap the router finds a pod, serves it, and sees it go")

    def _follow(self, account: str, port: int, command: Sequence[str] = COMMAND, *flags: str) -> None:
        """Run the router with the chart's configuration and the account's token, while a pod comes and goes."""
        found = json.loads(self._kubectl("get", "configmap", account, "--output", "json"))
        options: dict[str, Any] = yaml.safe_load(found["data"]["router.yaml"])
        options |= {"shutdown-drain-secs": 0, "prometheus-port": free_port()}
        if "service-discovery" in options:
            options["service-discovery-port"] = port
        for name in ("port", "log-format", "epp-port"):
            options.pop(name, None)
        (self._folder / "router.yaml").write_text(yaml.safe_dump(options))
        flags = ("--config", str(self._folder / "router.yaml"), "--kubeconfig", self._kubeconfig(account), *flags)
        router = start_router([], *flags, log=self._folder / "router.log", command=command)
        try:
            if router.get("/readiness").status != 503:
                raise Failure("the router is ready without a worker")
            self._cluster.create("engine-1", POD)
            _until(router, lambda: router.get("/readiness").status == 200)
            if router.post("/generate", {"text": "x"}).status != 200:
                raise Failure("a request to the pod's engine fails")
            self._cluster.delete("engine-1")
            _until(router, lambda: router.get("/readiness").status == 503)
            router.end()
        finally:
            if router.process.poll() is None:
                router.process.kill()
                router.process.wait()


def _definition(group: str, version: str, plural: str, kind: str) -> dict[str, Any]:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"plural": plural, "singular": kind.lower(), "kind": kind},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
        },
    }


@contextlib.contextmanager
def _engine() -> Iterator[int]:
    """Serve an engine at the pod's address; yield its port."""
    background = Background()
    engines = Engines(background, [POD], free_port(POD))
    try:
        yield engines.port
    finally:
        background.close()


def _until(router: RouterProcess, holds: Any) -> None:
    try:
        router.until(holds)
    except AssertionError as error:
        raise Failure(str(error)) from None
