"""The chart in a real API server: applied, changed, rolled back, and what its service account may do.

There is no kubelet: pods do not start. The router that uses the service account's token runs here, with the
configuration that the chart has put into the API server.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from scripts.deploy import chart, tools
from scripts.deploy.manifests import EVERYTHING
from scripts.deploy.report import Failure, Missing, Report, run
from scripts.kubernetes.cluster import NAMESPACE, Cluster, NoCluster
from scripts.kubernetes.link import Background, Engines

from routers import RouterProcess, free_port, start_router

POD = "127.0.0.61"
CUSTOM = (
    ("monitoring.coreos.com", "v1", "servicemonitors", "ServiceMonitor"),
    ("monitoring.coreos.com", "v1", "prometheusrules", "PrometheusRule"),
    ("keda.sh", "v1alpha1", "scaledobjects", "ScaledObject"),
)
"""Custom resources of the chart. Their models check what is in them (schemas.py); here the server only stores it."""


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
        self._account()

    def _kubectl(self, *words: str, text: str | None = None, ok: bool = True) -> str:
        return run([tools.kubectl(), "--namespace", NAMESPACE, *words], text=text, variables=self._variables, ok=ok)

    def _helm(self, *words: str) -> str:
        return run([tools.helm(), "--namespace", NAMESPACE, *words], variables=self._variables)

    def _plain_manifests(self) -> None:
        # The server is of a version that has no policy/v1 yet.
        text = chart.MANIFESTS.read_text("utf-8")
        if "policy/v1\n" not in self._kubectl("api-versions"):
            text = text.replace("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n")
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
        self._helm("install", "router", str(self._chart), "--dry-run=server")
        self._helm("install", "router", str(self._chart))
        self._report.ok("helm install, first as a server-side dry run")
        sets = [word for value in EVERYTHING for word in ("--set", value)]
        self._helm("upgrade", "router", str(self._chart), *sets)
        kinds = "deployment,service,configmap,pdb,hpa,networkpolicy,servicemonitor,prometheusrule,scaledobject"
        found = self._kubectl("get", kinds, "--output", "name").split()
        self._report.ok(f"helm upgrade to everything: {len(found)} objects in the namespace")
        self._helm("rollback", "router", "1")
        left = set(self._kubectl("get", kinds, "--output", "name").split())
        extra = [name for name in left if "hpa" in name or "horizontal" in name or "networkpolicy" in name]
        if extra or self._kubectl("get", "clusterrole", "--output", "name").count("sglang-router"):
            raise Failure(f"after a rollback there still is {extra}")
        self._report.ok("helm rollback takes away what the upgrade had added")

    def _account(self) -> None:
        account = "router-sglang-router"
        who = f"system:serviceaccount:{NAMESPACE}:{account}"
        for verb, what, may in (
            *((verb, "pods", "yes") for verb in ("get", "list", "watch")),
            *((verb, "pods", "no") for verb in ("create", "delete", "patch")),
            *(("get", what, "no") for what in ("secrets", "configmaps", "nodes", "deployments")),
        ):
            told = self._kubectl("auth", "can-i", verb, what, "--as", who, ok=False).strip()
            if told != may:
                raise Failure(f"the service account may {verb} {what}: {told}")
        if (
            self._kubectl("auth", "can-i", "list", "pods", "--as", who, "--namespace", "default", ok=False).strip()
            != "no"
        ):
            raise Failure("the service account may list pods of another namespace")
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token"
        token = self._cluster.must("POST", path, {"spec": {"expirationSeconds": 3600}})["status"]["token"]
        (self._folder / "token").write_text(str(token))
        config = self._cluster.kubeconfig("router", self._cluster.port, self._folder / "token")
        self._discovery(config)
        refused = subprocess.run(
            [tools.kubectl(), "--kubeconfig", config, "get", "secrets"], capture_output=True, text=True, check=False
        )
        if refused.returncode == 0 or "forbidden" not in refused.stderr.lower():
            raise Failure(f"the token reads secrets: {refused.stdout}{refused.stderr}")
        self._report.ok("its token may get, list and watch pods of its namespace, and nothing else; secrets: 403")

    def _discovery(self, config: str) -> None:
        """Run the router with the chart's configuration and the account's token, and let a pod come and go."""
        found = json.loads(self._kubectl("get", "configmap", "router-sglang-router", "--output", "json"))
        options: dict[str, Any] = yaml.safe_load(found["data"]["router.yaml"])
        with _engine() as port:
            options |= {"service-discovery-port": port, "shutdown-drain-secs": 0, "prometheus-port": free_port()}
            del options["port"], options["log-format"]
            (self._folder / "router.yaml").write_text(yaml.safe_dump(options))
            flags = ("--config", str(self._folder / "router.yaml"), "--kubeconfig", config)
            router = start_router([], *flags, log=self._folder / "router.log")
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
        self._report.ok("with its token and the chart's ConfigMap the router finds a pod, serves it, and sees it go")


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
