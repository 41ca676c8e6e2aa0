"""What is read of a pod's JSON, and what workers it makes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sglang_router.discovery.pod_answers import list_query, pods_path, read_event, read_page, watch_query
from sglang_router.discovery.pods import ENDING, OVER, READY, UNREADY, Pod, PodRules, workers

RULES = PodRules(roles={"regular": {"app": "engine"}}, port=8000)
PAIRS = PodRules(roles={"prefill": {"app": "e", "role": "p"}, "decode": {"app": "e", "role": "d"}}, port=8000)
READY_NOW = [{"type": "ContainersReady", "status": "False"}, {"type": "Ready", "status": "True"}]


def item(annotations: dict[str, str] | None = None, labels: dict[str, str] | None = None, **status: Any) -> Any:
    metadata: dict[str, Any] = {"name": "p", "namespace": "n", "uid": "u", "labels": labels or {"app": "engine"}}
    metadata |= {"annotations": annotations, "creationTimestamp": "2026-11-28T00:00:00Z", "managedFields": [{"a": 1}]}
    metadata |= {"deletionTimestamp": status.pop("deletion", None)}
    told = {"phase": "Running", "podIP": "10.0.0.1", "conditions": READY_NOW} | status
    return {"kind": "Pod", "metadata": metadata, "spec": {"x": None}, "status": told}


def pod(rules: PodRules = RULES, **facts: Any) -> Pod:
    page = read_page(msgspec.json.encode({"metadata": {}, "items": [item(**facts)]}))
    assert page.items
    return Pod.read(page.items[0], rules)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, READY),
        ({"conditions": None}, UNREADY),
        ({"conditions": [{"type": "Ready", "status": "Unknown"}]}, UNREADY),
        ({"phase": "Pending"}, UNREADY),
        ({"phase": "Succeeded"}, OVER),
        ({"phase": "Failed"}, OVER),
        ({"podIP": None}, OVER),
        ({"podIP": "not an address"}, OVER),
        ({"deletion": "2026-11-28T00:00:00Z"}, ENDING),
        ({"deletion": "2026-11-28T00:00:00Z", "phase": "Failed"}, OVER),
    ],
)
def test_the_state_of_a_pod(status: dict[str, Any], state: str) -> None:
    assert pod(**status).state == state


def test_a_pod_without_status_or_uid_is_none_yet() -> None:
    page = read_page(b'{"metadata":{},"items":[{"metadata":{"name":"p","labels":{"app":"engine"}}}]}')
    assert Pod.read((page.items or [])[0], RULES).state == OVER


def urls(found: Pod) -> list[str]:
    return [each.url for each in found.wanted()]


def test_addresses_of_both_families() -> None:
    assert urls(pod()) == ["http://10.0.0.1:8000"]
    assert urls(pod(podIP="FD00::0:1")) == ["http://[fd00::1]:8000"]
    assert pod(podIP="fe80::1%eth0").state == OVER, "no other machine can reach it"


@pytest.mark.parametrize(
    ("text", "ports"),
    [("8001", [8001]), (" 8001 , 8002 ", [8001, 8002]), ("65535", [65535])],
)
def test_ports_of_a_pod(text: str, ports: list[int]) -> None:
    assert [port for port, _ in pod(annotations={"sglang.ai/worker-ports": text}).engines] == ports


@pytest.mark.parametrize("text", ["", "0", "65536", "1,", "-1", "a", "8000;8001", "1,2,1", "9" * 2000])
def test_ports_that_are_none(text: str) -> None:
    read = pod(annotations={"sglang.ai/worker-ports": text})
    assert read.fault.startswith("annotation sglang.ai/worker-ports: ")
    assert len(read.fault) < 250
    assert read.wanted() == []


@pytest.mark.parametrize(
    ("ports", "bootstraps", "engines"),
    [
        ("8000,8001", "9000", ((8000, 9000), (8001, 9000))),
        ("8000,8001", "9000,9001", ((8000, 9000), (8001, 9001))),
        (None, "9000", ((8000, 9000),)),
        (None, None, ((8000, None),)),
    ],
)
def test_bootstrap_ports(ports: str | None, bootstraps: str | None, engines: Any) -> None:
    texts = {"sglang.ai/worker-ports": ports, "sglang.ai/bootstrap-port": bootstraps}
    given = {key: text for key, text in texts.items() if text}
    read = pod(PAIRS, annotations=given, labels={"app": "e", "role": "p"})
    assert (read.role, read.engines, read.fault) == ("prefill", engines, "")
    (decode,) = {boot for _, boot in pod(PAIRS, annotations=given, labels={"app": "e", "role": "d"}).engines}
    assert decode is None


def test_bootstrap_ports_that_do_not_fit_the_engines() -> None:
    texts = {"sglang.ai/worker-ports": "1,2,3", "sglang.ai/bootstrap-port": "8,9"}
    read = pod(PAIRS, annotations=texts, labels={"app": "e", "role": "p"})
    assert read.fault == "annotation sglang.ai/bootstrap-port has 2 ports for 3 engines; give one, or one each"


def test_a_pod_of_two_roles_is_a_mistake_and_one_of_none_is_nobody() -> None:
    both = PodRules(roles={"prefill": {"app": "e"}, "decode": {"app": "e"}})
    assert pod(both, labels={"app": "e"}).fault == "its labels fit the selectors of prefill and decode"
    other = pod(PAIRS, labels={"app": "e"})
    assert (other.role, other.fault) == ("", "")
    assert workers([other]) == ({}, [])


def test_what_cannot_be_a_models_name() -> None:
    rules = msgspec.structs.replace(RULES, model=("annotation", "m"))
    assert pod(rules, annotations={"m": "x" * 300}).fault.startswith("annotation m: 'xxx")
    assert pod(rules).model is None


def test_of_two_pods_at_one_address_the_ready_one_counts_then_the_younger() -> None:
    old, new = pod(), pod()
    old = msgspec.structs.replace(old, name="n/old", uid="u1", created="2026-11-28T00:00:00Z")
    new = msgspec.structs.replace(new, name="n/new", uid="u2", created="2026-11-28T00:00:01Z")
    for pods in ([old, new], [new, old]):
        assert workers(pods)[0]["http://10.0.0.1:8000"].instance == "u2"
        ends = [msgspec.structs.replace(each, state=ENDING if each is new else READY) for each in pods]
        assert workers(ends)[0]["http://10.0.0.1:8000"].instance == "u1"


def test_a_fault_that_comes_later_leaves_what_was_read_before() -> None:
    good = pod(annotations={"sglang.ai/worker-ports": "8001"})
    bad = pod(annotations={"sglang.ai/worker-ports": "?"}, conditions=None)
    kept = bad.after(good)
    assert (urls(kept), kept.state) == (["http://10.0.0.1:8001"], UNREADY)
    assert workers([kept])[1][0].endswith("it keeps what it had")
    assert kept.after(kept).engines == good.engines
    assert bad.after(msgspec.structs.replace(good, uid="other")).engines == ()
    assert workers([bad])[1][0].endswith("it is left out")


def test_what_is_asked_of_the_api() -> None:
    assert pods_path(None) == "/api/v1/pods"
    assert pods_path("a b") == "/api/v1/namespaces/a%20b/pods"
    assert PAIRS.common == {"app": "e"}
    assert list_query(PAIRS, None) == "limit=100&labelSelector=app%3De"
    assert list_query(PodRules(roles={"a": {"x": "1"}, "b": {"y": "1"}}), "t/=") == "limit=100&continue=t%2F%3D"
    assert watch_query(RULES, "7", 60) == (
        "watch=1&allowWatchBookmarks=true&resourceVersion=7&timeoutSeconds=60&labelSelector=app%3Dengine"
    )


def test_events_are_pods_bookmarks_or_errors() -> None:
    bookmark = read_event(b'{"type":"BOOKMARK","object":{"kind":"Pod","metadata":{"resourceVersion":"12"}}}')
    assert bookmark.object.metadata.version == "12"
    error = read_event(b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}')
    assert (error.object.code, error.object.message) == (410, "too old")
