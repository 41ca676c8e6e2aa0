"""Pods: what is read of the API's JSON, which of them are workers, and what each worker is.

    Pod.read(item, rules) --> Pod        only what counts: state, address, ports, role, model; nothing of the text stays
    workers(pods)         --> {URL: WantedWorker}, complaints

    state        when                                     its worker
    READY        phase Running, condition Ready           is added, gets requests
    UNREADY      not so, or not so any more               is not added; one that is there is kept, without new requests
    ENDING       it has a deletionTimestamp               the same
    OVER         phase Succeeded or Failed, or no         is removed: its address may be another pod's by now
                 address

A pod whose annotations cannot be read is left out with a complaint; one that was read before keeps what it had. Of
several pods at one URL (an old one that ends, and its successor) the ready one counts, then the youngest.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

import msgspec

from sglang_router.discovery.reconcile import WantedWorker
from sglang_router.routing.model_names import is_name

READY: Final = "ready"
UNREADY: Final = "unready"
ENDING: Final = "ending"
OVER: Final = "over"
_RANK: Final = {READY: 2, UNREADY: 1, ENDING: 0, OVER: -1}
_WITHHELD: Final = {READY: "", UNREADY: "its pod is not ready", ENDING: "its pod ends"}
_MOST_PORTS: Final = 64
_PORT: Final = re.compile(r"[0-9]{1,5}")
_LONGEST: Final = 100
"""Characters of an annotation that a complaint shows."""


_Short = Annotated[str, msgspec.Meta(max_length=1024)]
"""Names in Kubernetes have at most 253 characters. What is kept of 20,000 pods must not be as long as an answer."""


class PodMetadata(msgspec.Struct, kw_only=True):
    """`metadata` of an object. Everything may be missing or null."""

    name: _Short = ""
    namespace: _Short | None = None
    uid: _Short | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation: _Short | None = msgspec.field(name="creationTimestamp", default=None)
    deletion: str | None = msgspec.field(name="deletionTimestamp", default=None)
    version: str | None = msgspec.field(name="resourceVersion", default=None)
    following: str | None = msgspec.field(name="continue", default=None)


class PodCondition(msgspec.Struct):
    """One condition."""

    type: str = ""
    status: str = ""


class PodStatus(msgspec.Struct, kw_only=True):
    """`status` of a pod."""

    phase: str | None = None
    ip: str | None = msgspec.field(name="podIP", default=None)
    conditions: list[PodCondition] | None = None


class PodItem(msgspec.Struct, kw_only=True):
    """A pod as the API shows it."""

    metadata: PodMetadata
    status: PodStatus | None = None


class PodRules(msgspec.Struct, frozen=True, kw_only=True):
    """How pods become workers.

    roles            selectors by role; a pod that fits none is no worker
    port             where pods serve that do not name their ports
    target_ports     where all pods serve, whatever their annotations say; (): they may name their ports
    ports            key of the annotation that names them
    bootstrap        key of the annotation that names the bootstrap ports of prefill pods
    model            what names the model: ("namespace", ""), ("label", KEY), ("annotation", KEY); None: nothing does
    """

    roles: Mapping[str, Mapping[str, str]]
    port: int = 80
    ports: str = "sglang.ai/worker-ports"
    bootstrap: str = "sglang.ai/bootstrap-port"
    model: tuple[str, str] | None = None
    target_ports: tuple[int, ...] = ()

    @property
    def common(self) -> dict[str, str]:
        """The labels that all roles have in common: what the API server is asked for."""
        first, *others = self.roles.values()
        return {key: value for key, value in first.items() if all(each.get(key) == value for each in others)}


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """What counts of a pod.

    name     NAMESPACE/NAME
    state    one of READY, UNREADY, ENDING, OVER
    engines  the port of each engine, and its bootstrap port, if it has one
    fault    why it cannot be a worker; "": nothing
    """

    name: str
    uid: str
    created: str
    state: str
    ip: str
    role: str
    engines: tuple[tuple[int, int | None], ...] = ()
    model: str | None = None
    fault: str = ""

    @classmethod
    def read(cls, item: PodItem, rules: PodRules) -> Pod:
        """Return what counts of a pod."""
        metadata, status = item.metadata, item.status or PodStatus()
        labels = metadata.labels or {}
        ip = _address(status.ip)
        roles = [role for role, selector in rules.roles.items() if selector.items() <= labels.items()]
        pod = cls(
            name=f"{metadata.namespace or 'default'}/{metadata.name}",
            uid=metadata.uid or "",
            created=metadata.creation or "",
            state=_state(metadata, status, ip),
            ip=ip,
            role=roles[0] if roles else "",
        )
        if not roles:
            return pod
        if len(roles) > 1:
            return msgspec.structs.replace(pod, fault=f"its labels fit the selectors of {' and '.join(roles)}")
        try:
            engines = _engines(metadata.annotations or {}, rules, pod.role)
            model = _model(metadata, rules)
        except ValueError as error:
            return msgspec.structs.replace(pod, fault=str(error))
        return msgspec.structs.replace(pod, engines=engines, model=model)

    def after(self, before: Pod | None) -> Pod:
        """Return this pod with what was read of it before, if it cannot be read any more."""
        if before is None or not self.fault or before.uid != self.uid or not before.engines:
            return self
        kept: Pod = msgspec.structs.replace(self, role=before.role, engines=before.engines, model=before.model)
        return kept

    def wanted(self) -> list[WantedWorker]:
        """Return its workers: one for each of its engines."""
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return [
            WantedWorker(
                url=f"http://{host}:{port}",
                said={"worker_type": self.role, "bootstrap_port": bootstrap, "model_id": self.model},
                origin=self.name,
                instance=self.uid,
                addable=self.state == READY,
                withheld=_WITHHELD[self.state],
            )
            for port, bootstrap in self.engines
        ]


def workers(pods: Iterable[Pod]) -> tuple[dict[str, WantedWorker], list[str]]:
    """Return the workers that these pods are, by URL, and what is wrong with single pods."""
    found: dict[str, WantedWorker] = {}
    ranks: dict[str, tuple[int, str, str]] = {}
    complaints = []
    for pod in pods:
        if not pod.role or pod.state == OVER:
            continue
        if pod.fault:
            complaints.append(
                f"pod {pod.name}: {pod.fault}; it {'keeps what it had' if pod.engines else 'is left out'}"
            )
        rank = (_RANK[pod.state], pod.created, pod.uid)
        for each in pod.wanted():
            if each.url not in found or rank > ranks[each.url]:
                found[each.url], ranks[each.url] = each, rank
    return found, complaints


def _state(metadata: PodMetadata, status: PodStatus, ip: str) -> str:
    if not ip or not metadata.uid or status.phase in ("Succeeded", "Failed"):
        return OVER
    if metadata.deletion:
        return ENDING
    ready = any(each.type == "Ready" and each.status == "True" for each in status.conditions or ())
    return READY if ready and status.phase == "Running" else UNREADY


def _address(text: str | None) -> str:
    """Return an IP address in its normal form; "" for what is none, or one that counts on a single machine only."""
    try:
        found = ipaddress.ip_address(text or "")
    except ValueError:
        return ""
    return "" if getattr(found, "scope_id", None) else str(found)


def _engines(annotations: Mapping[str, str], rules: PodRules, role: str) -> tuple[tuple[int, int | None], ...]:
    """Return the ports of the engines of a pod, each with its bootstrap port. Raises: ValueError."""
    ports = [*rules.target_ports] or _ports(annotations, rules.ports) or [rules.port]
    if len(set(ports)) < len(ports):
        raise ValueError(f"annotation {rules.ports}: a port is there twice")
    if role != "prefill":
        return tuple((port, None) for port in ports)
    bootstraps: list[Any] = list(_ports(annotations, rules.bootstrap)) or [None]
    if len(bootstraps) == 1:
        bootstraps *= len(ports)
    if len(bootstraps) != len(ports):
        raise ValueError(
            f"annotation {rules.bootstrap} has {len(bootstraps)} ports for {len(ports)} engines; give one, or one each"
        )
    return tuple(zip(ports, bootstraps, strict=True))


def _ports(annotations: Mapping[str, str], key: str) -> list[int]:
    """Return the ports that an annotation names; none without it. Raises: ValueError."""
    text = annotations.get(key)
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")] if len(text) <= 8 * _MOST_PORTS else []
    if not parts or not all(_PORT.fullmatch(part) and 1 <= int(part) <= 65535 for part in parts):
        raise ValueError(f"annotation {key}: {text[:_LONGEST]!r} is not a port, or a list of ports as in 8000,8001")
    return [int(part) for part in parts]


def _model(metadata: PodMetadata, rules: PodRules) -> str | None:
    """Return the name of the model of a pod; None when nothing names it. Raises: ValueError."""
    if rules.model is None:
        return None
    kind, key = rules.model
    if kind == "namespace":
        return metadata.namespace
    texts = metadata.labels if kind == "label" else metadata.annotations
    name = (texts or {}).get(key)
    if name is not None and not is_name(name):
        raise ValueError(f"{kind} {key}: {name[:_LONGEST]!r} cannot be the name of a model")
    return name
