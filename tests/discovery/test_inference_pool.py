"""Workers from an InferencePool: its selector, its ports, and what happens when they change."""

from __future__ import annotations

import msgspec
import pytest

from discovery_scenes import kube_scene, url
from fake_kube import FakeKube
from sglang_router.discovery.inference_pool import (
    InferencePoolItem,
    InferencePoolSpec,
    MatchLabels,
    TargetPort,
    selected,
)

POOL = "llm/llama"
ENGINE = {"app": "engine"}


def two(api: FakeKube) -> None:
    """Create a pool, a pod that it selects, and one that it does not."""
    api.pool("llama", ENGINE, 8000)
    api.create("p1", "127.0.0.1")
    api.create("p2", "127.0.0.2", labels={"app": "other"})


def test_the_pods_that_the_pool_selects_become_workers() -> None:
    with kube_scene(two, pool=POOL) as scene:
        scene.until_urls(url(1))
        (report,) = scene.router.get("/workers").json()["discovery"]
        assert report["source"] == "kubernetes"
        assert report["looks_at"] == "the pods of InferencePool llm/llama"
        assert (report["workers"], report["error"]) == (1, None)
        scene.do(lambda: scene.api.create("p3", "127.0.0.3"))
        scene.until_urls(url(1), url(3))


def test_a_pod_is_a_worker_at_each_target_port_whatever_its_annotations_say() -> None:
    def prepare(api: FakeKube) -> None:
        api.pool("llama", ENGINE, 8000, 8001)
        api.create("p1", "127.0.0.1", annotations={"sglang.ai/worker-ports": "9000"})

    with kube_scene(prepare, pool=POOL) as scene:
        scene.until_urls(url(1), url(1, 8001))


def test_another_selector_and_other_ports_are_followed_at_once() -> None:
    with kube_scene(two, pool=POOL) as scene:
        scene.until_urls(url(1))
        scene.do(lambda: scene.api.pool("llama", {"app": "other"}, 8000))
        scene.until_urls(url(2))
        scene.do(lambda: scene.api.pool("llama", {"app": "other"}, 9000))
        scene.until_urls(url(2, 9000))


def test_a_pool_that_is_deleted_takes_its_workers_along_and_may_come_back() -> None:
    with kube_scene(two, pool=POOL) as scene:
        scene.until_urls(url(1))
        scene.do(lambda: scene.api.delete("llama"))
        scene.until_urls()
        scene.until(lambda: scene.report_error() == "there is no InferencePool llm/llama")
        scene.do(lambda: scene.api.pool("llama", ENGINE, 8000))
        scene.until_urls(url(1))
        scene.until(lambda: not scene.report_error())


def test_a_pool_that_comes_later_is_waited_for() -> None:
    with kube_scene(lambda api: api.create("p1", "127.0.0.1"), pool=POOL) as scene:
        scene.until(lambda: "there is no InferencePool" in scene.report_error())
        scene.do(lambda: scene.api.pool("another", ENGINE, 8000))
        scene.do(lambda: scene.api.pool("llama", ENGINE, 8000))
        scene.until_urls(url(1))


def test_a_cut_link_removes_no_worker_and_hides_no_change() -> None:
    with kube_scene(two, pool=POOL) as scene:
        scene.until_urls(url(1))

        def cut() -> None:
            scene.api.away = True
            scene.api.cut()
            scene.api.pool("llama", {"app": "other"}, 8000)

        scene.do(cut)
        scene.until(lambda: bool(scene.report_error()))
        assert scene.do(scene.urls) == [url(1)]
        scene.do(lambda: setattr(scene.api, "away", False))
        scene.until_urls(url(2))


def test_versions_that_are_too_old_are_made_good_by_a_list() -> None:
    with kube_scene(two, pool=POOL) as scene:
        scene.until_urls(url(1))
        scene.until(lambda: len(scene.api.watching) == 2)

        def expire() -> None:
            scene.api.say(b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}')
            scene.api.mute()
            scene.api.pool("llama", {"app": "other"}, 8000)

        scene.do(expire)
        scene.until_urls(url(2))


def test_what_is_missing_or_forbidden_is_said_with_what_to_do() -> None:
    def bare(api: FakeKube) -> None:
        api.has_pools = False

    with kube_scene(bare, pool=POOL) as scene:
        scene.until(lambda: "knows no InferencePool" in scene.report_error())

    def forbidden(api: FakeKube) -> None:
        api.refusal = (403, "inferencepools is forbidden")

    with kube_scene(forbidden, pool=POOL) as scene:
        scene.until(lambda: "needs a Role" in scene.report_error())


def test_a_change_that_cannot_be_leaves_the_workers_as_they_are() -> None:
    with kube_scene(two, pool=POOL) as scene:
        scene.until_urls(url(1))
        scene.do(lambda: scene.api.pool("llama", {}, 8000))
        scene.until(lambda: "matchLabels is empty" in scene.report_error())
        assert scene.do(scene.urls) == [url(1)]


@pytest.mark.parametrize("ports", [[], [TargetPort(number=0)], [TargetPort(number=70000)], None])
def test_ports_that_cannot_be_are_refused(ports: list[TargetPort] | None) -> None:
    spec = InferencePoolSpec(selector=MatchLabels(labels=ENGINE), ports=ports)
    with pytest.raises(ValueError, match="targetPorts"):
        selected(InferencePoolItem(spec=spec))


def test_more_ports_than_the_api_allows_are_refused() -> None:
    def of(count: int) -> InferencePoolItem:
        ports = [TargetPort(number=8000 + place) for place in range(count)]
        return InferencePoolItem(spec=InferencePoolSpec(selector=MatchLabels(labels=ENGINE), ports=ports))

    assert len(selected(of(8)).ports) == 8
    with pytest.raises(ValueError, match="has 9 ports, and 8 are allowed"):
        selected(of(9))


@pytest.mark.parametrize("labels", [ENGINE, {}])
def test_a_selector_that_says_more_than_labels_is_refused(labels: dict[str, str]) -> None:
    expressions = [msgspec.Raw(b'{"key":"env","operator":"NotIn","values":["test"]}')]
    spec = InferencePoolSpec(
        selector=MatchLabels(labels=labels, expressions=expressions), ports=[TargetPort(number=8000)]
    )
    with pytest.raises(ValueError, match="say it with matchLabels"):
        selected(InferencePoolItem(spec=spec))
