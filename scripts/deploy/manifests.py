"""The chart by itself: what helm and the schemas of Kubernetes say of it, and the router of its configuration."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from scripts import reporting
from scripts.deploy import chart, tools
from scripts.deploy.report import Failure, Report, run

from certificates import Authority
from documented import blocks

EVERYTHING = (
    "autoscaling.enabled=true",
    "engineScaling.enabled=true",
    "metrics.serviceMonitor.enabled=true",
    "metrics.prometheusRule.enabled=true",
    "networkPolicy.enabled=true",
    "keys.clients.secret=keys",
    "keys.operators.secret=keys",
    "tls.secret=certificate",
    "sharedState.secret=valkey",
    "discovery.allNamespaces=true",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "everything": EVERYTHING,
    "engines by HPA": ("engineScaling.enabled=true", "engineScaling.by=hpa"),
    "engines elsewhere, from zero": (
        *("engineScaling.enabled=true", "engineScaling.min=0", "discovery.namespace=engines"),
        "metrics.serviceMonitor.enabled=true",
    ),
    "pairs": ("discovery.prefillSelector[0]=role=prefill", "discovery.decodeSelector[0]=role=decode"),
    "no discovery": ("discovery.enabled=false", "config.worker-urls[0]=http://engine:8000", "listen=::"),
    "a store that keeps the key": ("sharedState.secret=valkey", "sharedState.fleetKey="),
    "a picker with its pool": ("mode=epp", "discovery.selector[0]=app=llama", "networkPolicy.enabled=true"),
    "a picker with TLS for a pool that is there": (
        *("mode=epp", "epp.tls.secret=certificate", "epp.pool.create=false", "epp.pool.name=llama"),
        *("discovery.enabled=false", "sharedState.secret=valkey", "keys.clients.secret=keys", "tls.secret=certificate"),
    ),
    "a picker without a pool": ("mode=epp", "epp.pool.create=false", "epp.service.appProtocol=kubernetes.io/h2c"),
    "places, names and numbers": (
        *("config.port=8080", "config.prometheus-port=9100", "config.shutdown-grace-period-secs=600"),
        *("config.max-buffered-request-bytes=4294967296", "podLabels.app\\.kubernetes\\.io/name=mine"),
        f"image.digest=sha256:{'0' * 64}",
    ),
    "several processes": ("config.relay-processes=4", "config.models=null", "image.tag=next", "replicaCount=1"),
}
PAGE = reporting.ROOT / "docs" / "deploy-kubernetes.md"
VERSIONS = ("1.30", "1.37")
"""Those whose schemas the manifests must fit."""
_IMAGE = f"registry:5000/a@sha256:{'0' * 64}"
MISTAKES = {
    "replicacount=3": "replicacount",
    "config.polciy=cost": "polciy",
    "config.policy=cots": "one of",
    "config.host=127.0.0.1": "see listen",
    "config.api-key=secret": "keys.clients",
    "config.worker-api-key=secret": "SGLANG_ROUTER_WORKER_API_KEY",
    "config=null": "missing property",
    "keys.clients=null": "missing property",
    "keys.clients.key=a/b": "pattern",
    "discovery.selector[0]=engine": "pattern",
    "discovery.selector=null": "missing property",
    "discovery.prefillSelector[0]=role=prefill": "belong together",
    "discovery.namespace=Engines": "pattern",
    "image.pullPolicy=Sometimes": "one of",
    f"image.repository={_IMAGE}": "pattern",
    "image.digest=sha256:12": "pattern",
    "fullnameOverride=Router": "pattern",
    "fullnameOverride=1st": "pattern",
    "podLabels.tier=1": "want string",
    "extraArgs[0]=--port=8080": "would not follow",
    "extraEnv[0].name=SGLANG_ROUTER_PORT": "would not follow",
    "rollout.maxSurge=0": "both 0",
    "rollout.maxUnavailable=few": "pattern",
    "podDisruptionBudget.maxUnavailable=-1": "minimum",
    "serviceAccount.create=false": "serviceAccount.name is missing",
    "autoscaling.enabled=true,autoscaling.minReplicas=9": "more than autoscaling.maxReplicas",
    "autoscaling.enabled=true,resources.requests.cpu=null": "needs resources.requests.cpu",
    "engineScaling.enabled=true,engineScaling.by=hpa,engineScaling.min=0": "minimum",
    "engineScaling.enabled=true,engineScaling.min=9": "more than engineScaling.max",
    "engineScaling.enabled=true,engineScaling.by=hpa,discovery.namespace=engines": "its own namespace",
    "mode=picker": "one of",
    "mode=epp,config.relay-processes=2": "one process",
    "mode=epp,discovery.allNamespaces=true": "its own namespace",
    "mode=epp,discovery.prefillSelector[0]=a=b,discovery.decodeSelector[0]=a=c": "pairs need two",
}
"""Values, and what must be said of them: a word of the reason."""


def check(report: Report) -> None:
    """Run all of it. Raises: Failure, Missing."""
    run([tools.helm(), "lint", "--strict", "--namespace", chart.NAMESPACE, chart.CHART])
    report.ok("helm lint --strict")
    (example,) = (each for each in blocks(PAGE) if each.marks.get("title") == "values.yaml")
    written = {f"the example at {example.where}": ((), example.text)}
    _variants(report, {**{name: (sets, "") for name, sets in VARIANTS.items()}, **written})
    for wrong, why in MISTAKES.items():
        _refused(wrong, why)
    report.ok(f"{len(MISTAKES)} mistakes in values are refused, with the reason")
    _names(report)
    _beside(report)
    if chart.MANIFESTS.read_text("utf-8") != chart.manifests():
        raise Failure(f"{chart.MANIFESTS.name} is not what the chart makes: python -m scripts.deploy.chart")
    report.ok("deploy/kubernetes/router.yaml is what the chart makes")


def _variants(report: Report, variants: dict[str, tuple[tuple[str, ...], str]]) -> None:
    """Check variants of the chart: their values as `chart.rendered` takes them, by name. Raises: Failure."""
    for version in VERSIONS:
        found = {
            name: chart.documents(chart.rendered(*sets, version=version, values=values))
            for name, (sets, values) in variants.items()
        }
        _fit(found, version)
        for documents in found.values():
            _holds_together(documents)
    for name, documents in found.items():
        _can_start(documents)
        report.ok(
            f"{name}: {len(documents)} objects fit the schemas of Kubernetes {' and '.join(VERSIONS)}, each other and"
            " `restricted`; the router accepts the configuration inside"
        )


def _fit(found: dict[str, list[dict[str, Any]]], version: str) -> None:
    """Validate objects by the schemas; they come with a name for what they are part of. Raises: Failure."""
    words = [sys.executable, Path(__file__).with_name("schemas.py"), version]
    run(words, text=json.dumps(found), variables={"PYTHONPATH": str(tools.validators())})


def _refused(sets: str, why: str) -> None:
    words = [tools.helm(), "template", "x", chart.CHART, "--set", sets]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode == 0 or why not in done.stderr:
        raise Failure(f"--set {sets} was to be refused because of {why}: {done.stderr}")


def _holds_together(documents: list[dict[str, Any]]) -> None:
    """Check what no schema knows: each part names what another one has. Raises: Failure."""
    options, described = configuration(documents), container(documents)
    (pod,) = (each["spec"]["template"] for each in documents if each["kind"] == "Deployment")
    ports = {each["name"]: each["containerPort"] for each in described["ports"]}
    names = {"http": "port", "metrics": "prometheus-port", "epp": "epp-port"}
    if any(options[names[name]] != number for name, number in ports.items()):
        raise Failure(f"the container says {ports}, and the router listens elsewhere: {options}")
    needed = options["shutdown-drain-secs"] + options["shutdown-grace-period-secs"]
    if pod["spec"]["terminationGracePeriodSeconds"] <= needed:
        raise Failure(f"the pod is killed before the router has ended, after {needed} s")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        _reaches(described[probe], ports, options)
    for each in documents:
        if each["kind"] == "Service":
            _chooses(each["spec"]["selector"], pod["metadata"]["labels"])
            if not {port["targetPort"] for port in each["spec"]["ports"]} <= set(ports):
                raise Failure(f"{each['metadata']['name']} leads to a port that the container does not have")
        if each["kind"] in ("PodDisruptionBudget", "NetworkPolicy", "Deployment"):
            selector = each["spec"].get("selector") or each["spec"]["podSelector"]
            _chooses(selector["matchLabels"], pod["metadata"]["labels"])
        if each["kind"] == "PodDisruptionBudget" and each["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            raise Failure("while all engines are away, no router is ready, and no node could be drained")
    _scales_by_what_is_scraped(documents)
    _reads_what_it_may(documents, options, pod["spec"])
    _restricted(pod["spec"])


def _scales_by_what_is_scraped(documents: list[dict[str, Any]]) -> None:
    """Check that the engines are scaled by the metric of this router, as its scrape labels it. Raises: Failure."""
    names = [each["metadata"]["name"] for each in documents if each["kind"] == "Service"]
    (scraped,) = (name for name in names if name.endswith("-metrics"))
    for each in documents:
        if each["kind"] == "ScaledObject":
            (trigger,) = (trigger["metadata"] for trigger in each["spec"]["triggers"])
            if f'service="{scraped}"' not in trigger["query"] or trigger.get("ignoreNullValues") != "false":
                raise Failure(f"not what is scraped, or no answer counts as 0 engines: {trigger}")
        if each["kind"] == "HorizontalPodAutoscaler":
            metrics = [metric["external"]["metric"] for metric in each["spec"]["metrics"] if "external" in metric]
            if any(metric["selector"]["matchLabels"] != {"service": scraped} for metric in metrics):
                raise Failure(f"not what is scraped: {metrics}")


def _reaches(probe: dict[str, Any], ports: dict[str, int], options: dict[str, Any]) -> None:
    """Check that a probe asks where the router answers, as it is asked. Raises: Failure."""
    http, grpc = probe.get("httpGet"), probe.get("grpc")
    if http and (http["port"] != "http" or (http["scheme"] == "HTTPS") != ("tls-cert-path" in options)):
        raise Failure(f"a probe does not reach the router: {probe}")
    if grpc and (grpc["port"] != ports["epp"] or "epp-tls-cert-path" in options):
        raise Failure(f"a probe does not reach the picker, or cannot because of TLS: {probe}")


def _chooses(selector: dict[str, str], labels: dict[str, str]) -> None:
    if not selector.items() <= labels.items():
        raise Failure(f"the pods have not the labels {selector}: {labels}")


def _reads_what_it_may(documents: list[dict[str, Any]], options: dict[str, Any], pod: dict[str, Any]) -> None:
    """Check that the router has a token exactly if it needs one, and no right that it does not use. Raises: Failure."""
    needs = {"pods"} if options.get("service-discovery") or "inference-pool" in options else set()
    needs |= {"inferencepools"} if "inference-pool" in options else set()
    rules = [rule for each in documents if each["kind"] in ("Role", "ClusterRole") for rule in each["rules"]]
    may = {what for rule in rules for what in rule["resources"]}
    verbs = {verb for rule in rules for verb in rule["verbs"]}
    if may != needs or not verbs <= {"get", "list", "watch"} or pod["automountServiceAccountToken"] != bool(needs):
        raise Failure(f"the router needs {sorted(needs)}, and may {sorted(verbs)} {sorted(may)}")


def _restricted(pod: dict[str, Any]) -> None:
    """Check a pod by the Pod Security Standard `restricted`. Raises: Failure."""
    security, wrong = pod["securityContext"], []
    if not security.get("runAsNonRoot") or security.get("runAsUser") == 0:
        wrong.append("it may run as root")
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        wrong.append("it has no seccompProfile")
    wrong += [name for name in ("hostNetwork", "hostPID", "hostIPC", "initContainers") if pod.get(name)]
    allowed = {"configMap", "emptyDir", "secret", "projected", "downwardAPI", "persistentVolumeClaim", "csi"}
    wrong += [f"a volume {volume}" for volume in pod["volumes"] if not set(volume) - {"name"} <= allowed]
    for each in pod["containers"]:
        own = each["securityContext"]
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
            wrong.append("it keeps privileges")
        if own.get("privileged") or own["capabilities"].get("add") or not own.get("readOnlyRootFilesystem"):
            wrong.append("it may more than it needs")
        wrong += [f"hostPort {port}" for port in each["ports"] if "hostPort" in port]
    if wrong:
        raise Failure(f"not fit for the Pod Security Standard `restricted`: {', '.join(wrong)}")


def _names(report: Report) -> None:
    """Let the names of release and namespace be as long as they may be, and look like numbers. Raises: Failure."""
    found: dict[str, list[dict[str, Any]]] = {}
    for release, space in (("a" * 53, "n" * 63), ("a" * 53, "1e3"), ("123-sglang-router", "0"), ("no", "123")):
        name = "n-1" if release[0].isdigit() else ""  # a Service must begin with a letter
        sets = ("discovery.allNamespaces=false", "discovery.namespace=engines", f"fullnameOverride={name}")
        documents = chart.documents(chart.rendered(*EVERYTHING, *sets, release=release, namespace=space))
        found[f"release {release} in {space}"] = documents
        for each in documents:
            about = each["metadata"]
            longest = 253 if "Role" in each["kind"] else 63
            words = [about["name"], about.get("namespace", ""), *about["labels"].values()]
            if not all(isinstance(word, str) for word in words) or len(about["name"]) > longest:
                raise Failure(f"release {release} in {space}: {each['kind']} {about}")
    _fit(found, VERSIONS[-1])
    report.ok("releases and namespaces with long names, and with names like numbers: every name fits")


def _beside(report: Report) -> None:
    """Let releases stand beside each other; none may own what another one owns. Raises: Failure."""
    sets = (*EVERYTHING, "discovery.allNamespaces=false", "discovery.namespace=engines")
    owners: dict[tuple[str, ...], str] = {}
    for space, release in (("one", "a"), ("one", "b"), ("two", "a"), ("engines", "a")):
        for each in chart.documents(chart.rendered(*sets, release=release, namespace=space)):
            key = (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"])
            if (owner := owners.setdefault(key, f"{release} in {space}")) != f"{release} in {space}":
                raise Failure(f"{' '.join(key)} is of {owner} and of {release} in {space}")
    report.ok(
        "two releases in a namespace, and three namespaces whose routers share the engines of one, do not collide"
    )


def configuration(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the router's options in the ConfigMap."""
    (found,) = (each["data"]["router.yaml"] for each in documents if each["kind"] == "ConfigMap")
    return dict(yaml.safe_load(found))


def container(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the router's container in the Deployment."""
    (found,) = (each["spec"]["template"]["spec"]["containers"][0] for each in documents if each["kind"] == "Deployment")
    return dict(found)


def _can_start(documents: list[dict[str, Any]]) -> None:
    """Let the router check the configuration, as its container has it, with files where Secrets would be."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, key in (("clients", "alice secret-1"), ("operators", "id:name:admin:secret-2")):
            (folder / name).mkdir()
            (folder / name / name).write_text(f"{key}\n")
            (folder / name / name).chmod(0o600)
        pair = Authority(folder / "ca").issue("router", "DNS:router")
        for name in ("tls", "epp-tls"):
            (folder / name).mkdir()
            (folder / name / "tls.crt").write_bytes(Path(pair.cert).read_bytes())
            (folder / name / "tls.key").write_bytes(Path(pair.key).read_bytes())
        (folder / "fleet").mkdir()
        (folder / "fleet" / "fleet-key").write_text(f"{'5a' * 32}\n")
        (folder / "fleet" / "fleet-key").chmod(0o600)
        (folder / "kubeconfig").write_text(_KUBECONFIG)
        (folder / "kubeconfig").chmod(0o600)
        text = yaml.safe_dump(configuration(documents)).replace("/etc/sglang-router", str(folder))
        (folder / "config").mkdir()
        (folder / "config" / "router.yaml").write_text(text)
        described = container(documents)
        flags = [str(word).replace("/etc/sglang-router", str(folder)) for word in described["args"]]
        variables = {each["name"]: each.get("value", _STORE) for each in described["env"]} | {
            "KUBECONFIG": str(folder / "kubeconfig")
        }
        words = [sys.executable, "-m", "sglang_router", *flags, "--check-config"]
        run(words, variables={**variables, "PYTHONPATH": str(reporting.ROOT / "src")})


_STORE = "redis://:secret-3@127.0.0.1:1"
"""What the Secret of the store holds, the only one that becomes a variable."""
_KUBECONFIG = """
current-context: x
clusters: [{name: x, cluster: {server: "https://127.0.0.1:1"}}]
users: [{name: x, user: {token: x}}]
contexts: [{name: x, context: {cluster: x, user: x}}]
"""
