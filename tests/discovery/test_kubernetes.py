"""Workers from Kubernetes: every case that a cluster brings, against an API server that does as it is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from discovery_scenes import DEFAULTS, ENGINES, QUICK, FreshFiles, Token, kube_scene, url
from fake_kube import FakeKube
from sglang_router.discovery import kubernetes
from sglang_router.discovery.kube_api import KubeError
from sglang_router.discovery.kube_rounds import KubeRhythm, pause_after
from sglang_router.discovery.pods import PodRules
from sglang_router.routing.source import Source

PAIRS = PodRules(
    roles={"prefill": {"app": "engine", "role": "prefill"}, "decode": {"app": "engine", "role": "decode"}}, port=8000
)


def engines(*numbers: int) -> Callable[[FakeKube], None]:
    """Return what creates ready pods p1 at 127.0.0.1 and so on."""

    def create(api: FakeKube) -> None:
        for number in numbers:
            api.create(f"p{number}", f"127.0.0.{number}")

    return create


# -- a pod's life ------------------------------------------------------------------------------------------------------


def test_ready_pods_become_workers_and_say_where_they_come_from() -> None:
    with kube_scene(engines(1, 2)) as scene:
        scene.until_urls(url(1), url(2))
        shown = {each["url"]: each for each in scene.router.get("/workers").json()["workers"]}
        assert shown[url(1)]["source"] == "kubernetes"
        assert shown[url(1)]["origin"] == {"name": "llm/p1", "instance": "uid-1"}
        (report,) = scene.router.get("/workers").json()["discovery"]
        assert report["source"] == "kubernetes"
        assert report["looks_at"] == "pods with app=engine in namespace llm"
        assert (report["workers"], report["error"], report["added"]) == (2, None, 2)
        assert 0.0 <= report["listed_secs"] < 60.0
        assert scene.api.lists[0] == {"limit": "100", "labelSelector": "app=engine"}
        assert all(agent.startswith("sglang-router/") for agent in scene.api.agents)


def test_a_pod_is_added_changed_and_deleted_without_another_list() -> None:
    with kube_scene() as scene:
        scene.until(lambda: bool(scene.api.watching))
        scene.do(lambda: scene.api.create("p1"))  # no address yet
        scene.do(lambda: scene.api.create("p2", "127.0.0.2", ready=False))
        scene.do(lambda: scene.api.create("p3", "127.0.0.3"))
        scene.until_urls(url(3))
        scene.do(lambda: scene.api.change("p1", "127.0.0.1", ready=True))
        scene.do(lambda: scene.api.change("p2", ready=True))
        scene.until_urls(url(1), url(2), url(3))
        scene.do(lambda: scene.api.delete("p2"))
        scene.until_urls(url(1), url(3))
        assert len(scene.api.lists) == 1
        assert scene.report.removed == {"gone": 1}


def test_a_pod_that_ends_gets_no_new_requests_and_is_removed_when_it_is_gone() -> None:
    with kube_scene(engines(1, 2)) as scene:
        scene.until_urls(url(1), url(2))
        worker = scene.worker(url(1))
        scene.do(lambda: scene.api.delete("p1", grace=30))
        scene.until(lambda: worker.withheld == "its pod ends")
        assert not worker.in_rotation
        assert not worker.removed
        assert [each.url for each in scene.do(lambda: scene.fleet.candidates(0.0))] == [url(2)]
        scene.do(lambda: scene.api.finish("p1"))
        scene.until_urls(url(2))


def test_an_unready_pod_keeps_its_worker_with_all_that_is_known_of_it() -> None:
    with kube_scene(engines(1)) as scene:
        scene.until_urls(url(1))
        worker = scene.worker(url(1))
        scene.do(lambda: scene.api.change("p1", ready=False))
        scene.until(lambda: worker.withheld == "its pod is not ready")
        assert scene.router.get("/workers").json()["workers"][0]["withheld"] == "its pod is not ready"
        scene.do(lambda: scene.api.change("p1", ready=True))
        scene.until(lambda: worker.in_rotation)
        assert scene.worker(url(1)) is worker
        assert worker.life == worker.caches == 0


def test_an_operators_drain_and_the_pods_state_do_not_end_each_other() -> None:
    with kube_scene(engines(1)) as scene:
        scene.until_urls(url(1))
        worker = scene.worker(url(1))
        scene.do(lambda: scene.api.change("p1", ready=False))
        scene.until(lambda: worker.withheld != "")
        scene.do(lambda: scene.fleet.set_draining(worker, True))
        scene.do(lambda: scene.api.change("p1", ready=True))
        scene.until(lambda: worker.withheld == "")
        assert worker.draining
        assert not worker.in_rotation


def test_another_pod_at_the_same_address_is_another_worker() -> None:
    with kube_scene(engines(1)) as scene:
        scene.until_urls(url(1))
        before = scene.worker(url(1))
        scene.do(lambda: scene.api.delete("p1", grace=30))
        scene.do(lambda: scene.api.create("p9", "127.0.0.1"))
        scene.until(lambda: before.removed and scene.urls() == [url(1)])
        after = scene.worker(url(1))
        assert (after.spec.origin, after.spec.instance) == ("llm/p9", "uid-2")
        assert after.id != before.id
        assert after.withheld == ""
        assert scene.report.removed == {"replaced": 1}
        scene.do(lambda: scene.api.finish("p1"))  # the end of the old one does not concern its successor
        scene.do(lambda: scene.api.create("p2", "127.0.0.2"))
        scene.until_urls(url(1), url(2))
        assert scene.worker(url(1)) is after


def test_a_successor_of_the_same_name_that_is_not_ready_ends_the_old_worker() -> None:
    """A StatefulSet gives the next pod the same name; with the host's network, the same address as well."""
    with kube_scene(engines(1)) as scene:
        scene.until_urls(url(1))
        scene.do(lambda: scene.api.delete("p1"), lambda: scene.api.create("p1", "127.0.0.1", ready=False))
        scene.until_urls()
        scene.do(lambda: scene.api.change("p1", ready=True))
        scene.until_urls(url(1))


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_is_over_has_no_worker_though_it_is_still_listed(phase: str) -> None:
    """An evicted pod stays for days, and its address is given to others."""
    with kube_scene(engines(1, 2)) as scene:
        scene.until_urls(url(1), url(2))
        scene.do(lambda: scene.api.change("p1", phase=phase))
        scene.until_urls(url(2))


def test_a_label_that_moves_away_takes_the_worker_and_brings_it_back() -> None:
    with kube_scene(engines(1)) as scene:
        scene.until_urls(url(1))
        scene.do(lambda: scene.api.change("p1", labels={"app": "other"}))
        scene.until_urls()
        scene.do(lambda: scene.api.change("p1", labels={"app": "engine"}))
        scene.until_urls(url(1))


# -- what a pod says of itself -----------------------------------------------------------------------------------------


def test_a_pod_with_two_ports_is_two_workers() -> None:
    with kube_scene() as scene:
        scene.do(lambda: scene.api.create("p1", "127.0.0.1", annotations={"sglang.ai/worker-ports": "9000, 9001"}))
        scene.until_urls(url(1, 9000), url(1, 9001))
        scene.do(lambda: scene.api.change("p1", annotations={"sglang.ai/worker-ports": "9001"}))
        scene.until_urls(url(1, 9001))


def test_roles_come_by_selectors_and_prefill_pods_have_bootstrap_ports() -> None:
    def create(api: FakeKube) -> None:
        ports = {"sglang.ai/bootstrap-port": "8998"}
        api.create("p1", "127.0.0.1", {"app": "engine", "role": "prefill"}, ports)
        api.create("p2", "127.0.0.2", {"app": "engine", "role": "decode"}, ports)
        api.create("p3", "127.0.0.3", {"app": "engine", "role": "router"})

    with kube_scene(create, PAIRS) as scene:
        scene.until_urls(url(1), url(2))
        specs = {worker.url: (worker.spec.worker_type, worker.spec.bootstrap_port) for worker in scene.fleet}
        assert specs == {url(1): ("prefill", 8998), url(2): ("decode", None)}
        assert scene.api.lists[0]["labelSelector"] == "app=engine"  # what all roles have in common
        before = scene.worker(url(1))
        scene.do(lambda: scene.api.change("p1", labels={"app": "engine", "role": "decode"}))
        scene.until(lambda: scene.fleet.by_url(url(1)).spec.worker_type == "decode")  # type: ignore[union-attr]
        assert scene.worker(url(1)) is before
        assert before.spec.bootstrap_port is None


def test_bad_annotations_concern_one_pod_and_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def create(api: FakeKube) -> None:
        api.create("bad", "127.0.0.1", annotations={"sglang.ai/worker-ports": "http"})
        api.create("good", "127.0.0.2")

    with caplog.at_level(logging.WARNING), kube_scene(create) as scene:
        scene.until_urls(url(2))
        scene.do(lambda: scene.api.create("p3", "127.0.0.3"))
        scene.until_urls(url(2), url(3))
        said = [record.getMessage() for record in caplog.records if "pod llm/bad" in record.getMessage()]
        assert len(said) == 1
        assert "sglang.ai/worker-ports: 'http' is not a port" in said[0]
        scene.do(lambda: scene.api.change("bad", annotations={"sglang.ai/worker-ports": "8000"}))
        scene.until_urls(url(1), url(2), url(3))
        scene.do(lambda: scene.api.change("bad", annotations={"sglang.ai/worker-ports": "?"}))
        scene.do(lambda: scene.api.change("p3", ready=False))
        scene.until(lambda: bool(scene.fleet.by_url(url(3)).withheld))  # type: ignore[union-attr]
        assert scene.urls() == [url(1), url(2), url(3)]  # it keeps what it had
        assert "'?' is not a port" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("model", "expected"),
    [(("namespace", ""), "llm"), (("label", "model"), "llama"), (("annotation", "m"), "a b"), (("label", "no"), None)],
)
def test_the_model_comes_from_where_the_option_says(model: tuple[str, str], expected: str | None) -> None:
    def create(api: FakeKube) -> None:
        api.create("p1", "127.0.0.1", {"app": "engine", "model": "llama"}, {"m": "a b"})

    with kube_scene(create, msgspec.structs.replace(ENGINES, model=model)) as scene:
        scene.until_urls(url(1))
        assert scene.worker(url(1)).spec.model_id == expected


# -- trouble with the API server ---------------------------------------------------------------------------------------


def test_events_that_were_lost_with_the_connection_are_made_good_by_a_list() -> None:
    """0.3.2 kept the worker of a pod that was deleted meanwhile for ever, and served from it."""
    with kube_scene(engines(1, 2)) as scene:
        scene.until_urls(url(1), url(2))

        def away() -> None:
            scene.api.away = True
            scene.api.cut()
            scene.api.delete("p1")
            scene.api.create("p3", "127.0.0.3")

        scene.do(away)
        scene.until(lambda: scene.report_error() != "")
        assert scene.urls() == [url(1), url(2)]  # its loss is not their death
        assert "known" not in scene.report.failures
        scene.do(lambda: setattr(scene.api, "away", False))
        scene.until_urls(url(2), url(3))
        scene.until(lambda: scene.report_error() == "")


def test_a_watch_that_is_too_old_is_followed_by_a_list() -> None:
    with kube_scene(engines(1, 2)) as scene:
        scene.until_urls(url(1), url(2))
        scene.until(lambda: len(scene.api.watching) == 1)

        def miss() -> None:
            scene.api.mute()  # the connection stays
            scene.api.delete("p1")
            scene.api.create("p3", "127.0.0.3")
            scene.api.forget(scene.api.version)
            scene.api.cut()

        scene.do(miss)
        scene.until_urls(url(2), url(3))
        assert len(scene.api.lists) == 2

    with kube_scene(engines(1)) as scene:  # the same inside an open stream
        scene.until(lambda: len(scene.api.watching) == 1)
        gone = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}}
        scene.do(lambda: scene.api.say(json.dumps(gone).encode()))
        scene.until(lambda: len(scene.api.lists) == 2 and len(scene.api.watching) > 0)
        assert scene.report.failures == {"watch_expired": 1}
        assert scene.report.error is None


def test_a_watch_that_ends_as_told_goes_on_from_the_last_version_without_a_list() -> None:
    with kube_scene(engines(1)) as scene:
        scene.until(lambda: len(scene.api.watching) == 1)
        scene.do(lambda: scene.api.create("web", "127.0.0.9", labels={"app": "web"}))
        scene.do(scene.api.bookmark)
        scene.do(scene.api.end_watches)
        scene.until(lambda: len(scene.api.watches) == 2)
        assert [each["resourceVersion"] for each in scene.api.watches] == ["1", "2"]  # the bookmark's
        assert scene.api.watches[0]["allowWatchBookmarks"] == "true"
        assert int(scene.api.watches[0]["timeoutSeconds"]) <= 3600
        scene.until(lambda: len(scene.api.watching) == 1)
        scene.do(lambda: scene.api.create("p2", "127.0.0.2"))
        scene.until_urls(url(1), url(2))
        assert len(scene.api.lists) == 1


def test_a_silent_watch_is_given_up_and_what_was_missed_is_found() -> None:
    """A NAT that forgot the connection: it stays open and says nothing, for ever."""
    with kube_scene(engines(1, 2), rhythm=QUICK._replace(relist=2.0, slack=0.2)) as scene:
        scene.until_urls(url(1), url(2))
        scene.until(lambda: len(scene.api.watching) == 1)

        def drop() -> None:
            scene.api.mute()
            scene.api.delete("p1")
            scene.api.create("p3", "127.0.0.3")

        scene.do(drop)
        scene.until_urls(url(2), url(3))
        assert scene.do(lambda: scene.report_error()) == ""


def test_an_api_server_that_is_down_at_the_start_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), kube_scene(up=False) as scene:
        scene.until(lambda: "nobody listens there" in scene.report_error())
        assert scene.report.listed_secs is None
        scene.router.run(scene.api.start())
        scene.do(lambda: scene.api.create("p1", "127.0.0.1"))
        scene.until_urls(url(1))
        scene.router.run(scene.api.stop())  # and later, once more
        scene.until(lambda: scene.report_error() != "")
        assert scene.urls() == [url(1)]
        scene.do(lambda: scene.api.delete("p1"))
        scene.router.run(scene.api.start())
        scene.until_urls()
        scene.until(lambda: scene.report_error() == "")
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len([text for text in warnings if "nobody listens there" in text]) == 2  # once each time
        assert any("it works again, after" in record.getMessage() for record in caplog.records)


def test_what_cannot_be_read_is_trouble_and_no_end() -> None:
    with kube_scene(engines(1)) as scene:
        scene.until(lambda: len(scene.api.watching) == 1)
        scene.do(lambda: scene.api.say(b"{not json"))
        scene.until(lambda: len(scene.api.lists) == 2)
        scene.do(lambda: scene.api.create("p2", "127.0.0.2"))
        scene.until_urls(url(1), url(2))
        assert scene.report.failures == {"watch_invalid": 1}


def test_the_codes_of_an_error_are_few_and_its_text_is_short_and_printable(caplog: pytest.LogCaptureFixture) -> None:
    """Each code made a label of a metric."""
    with caplog.at_level(logging.DEBUG), kube_scene(engines(1)) as scene:
        codes = [1, 99999, -5, 500]
        while codes:
            scene.until(lambda: len(scene.api.watching) > 0)
            status = {"kind": "Status", "code": codes.pop(), "message": f"no\n{'x' * 5000}"}
            scene.do(partial(scene.api.say, json.dumps({"type": "ERROR", "object": status}).encode()), scene.api.mute)
        scene.until(lambda: len(scene.api.watches) == 5)
        assert scene.report.failures == {"watch_error": 3, "watch_500": 1}
        ended = [text for text in caplog.messages if "the watch ended" in text]
        assert len(ended) == 4
        assert all(len(text) < 400 and text.isprintable() for text in ended)


def test_a_list_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages were asked for without end, and nothing else was done."""
    monkeypatch.setattr(kubernetes, "_MOST_PAGES", 3)
    with kube_scene(engines(*range(1, 251))) as scene:
        scene.until(lambda: len(scene.fleet) == 250)
        scene.do(lambda: [scene.api.create(f"q{number}", f"127.0.1.{number}") for number in range(1, 101)])
        scene.until(lambda: len(scene.fleet) == 350)
        scene.do(scene.api.cut)
        scene.until(lambda: "more than 3 pages" in scene.report_error())
        assert len(scene.urls()) == 350


# -- who may ask -------------------------------------------------------------------------------------------------------


def test_a_missing_role_is_said_plainly_and_works_once_it_is_granted(caplog: pytest.LogCaptureFixture) -> None:
    def forbid(api: FakeKube) -> None:
        engines(1)(api)
        api.refusal = 403, 'pods is forbidden: User "x" cannot list resource "pods"'

    with caplog.at_level(logging.WARNING), kube_scene(forbid) as scene:
        scene.until(lambda: "answers 403: pods is forbidden" in scene.report_error())
        assert "needs a Role to get, list and watch pods in namespace llm" in scene.report_error()
        scene.do(lambda: setattr(scene.api, "refusal", None))
        scene.until_urls(url(1))
        scene.do(lambda: setattr(scene.api, "refusal", (403, "withdrawn")))
        scene.do(scene.api.cut)
        scene.until(lambda: "withdrawn" in scene.report_error())
        assert scene.urls() == [url(1)]
    with kube_scene(forbid, namespace=None) as scene:
        scene.until(lambda: "needs a ClusterRole" in scene.report_error())
        assert "--service-discovery-namespace" in scene.report_error()


def test_a_role_without_watch_is_said_and_lists_go_on() -> None:
    def forbid(api: FakeKube) -> None:
        api.watch_refusal = 403, "cannot watch"

    with kube_scene(forbid) as scene:
        scene.until(lambda: "cannot watch" in scene.report_error())
        scene.do(lambda: scene.api.create("p1", "127.0.0.1"))
        scene.until_urls(url(1))
        assert "cannot watch" in scene.report_error()


def test_a_token_that_was_replaced_is_read_again() -> None:
    with kube_scene(files=lambda api: FreshFiles(tokens[0].access), prepare=lambda api: prepare(api)) as scene:
        scene.until_urls(url(1))
        scene.do(lambda: setattr(scene.api, "tokens", {"t2"}))
        scene.do(lambda: scene.api.cut(), lambda: scene.api.create("p2", "127.0.0.2"))
        scene.until(lambda: "does not accept the token of the token file" in scene.report_error())
        assert "t1" not in scene.report_error().replace("does not accept", "")
        assert scene.urls() == [url(1)]
        tokens[0].value = "t2"
        scene.until_urls(url(1), url(2))


tokens: list[Token] = []


def prepare(api: FakeKube) -> None:
    tokens[:] = [Token(api)]
    api.tokens = {"t1"}
    api.create("p1", "127.0.0.1")


def test_pauses_between_lists() -> None:
    cut, forbidden, unknown = KubeError("broken", ""), KubeError("403", "", 403), KubeError("401", "", 401)
    rhythm = KubeRhythm()
    assert [pause_after(cut, failures, rhythm) for failures in (1, 2, 3, 4, 9, 999)] == [0.0, 0.1, 0.2, 0.4, 1.0, 1.0]
    assert pause_after(forbidden, 1, rhythm) == pause_after(unknown, 99, rhythm) == 2.0
    assert pause_after(KubeError("503", "", 503), 1, rhythm) == 0.0
    assert pause_after(KubeError("429", "", 429, pause=7.0), 1, rhythm) == 7.0
    assert pause_after(KubeError("429", "", 429, pause=1e9), 1, rhythm) == 60.0


# -- many --------------------------------------------------------------------------------------------------------------


def test_a_burst_of_pods_is_one_pass() -> None:
    rhythm = QUICK._replace(quiet=0.3, longest=30.0)
    with kube_scene(engines(1), rhythm=rhythm) as scene:
        scene.until(lambda: len(scene.api.watching) == 1 and len(scene.fleet) == 1)
        assert scene.report.passes == 1
        scene.do(lambda: engines(*range(2, 102))(scene.api))
        scene.until(lambda: len(scene.fleet) == 101)
        assert scene.report.passes == 2


def test_events_without_end_do_not_put_a_pass_off_for_ever() -> None:
    rhythm = QUICK._replace(quiet=5.0, longest=0.1)
    with kube_scene(rhythm=rhythm) as scene:
        scene.until(lambda: len(scene.api.watching) == 1)
        scene.do(lambda: scene.api.create("p1", "127.0.0.1"))
        scene.until_urls(url(1))


def test_a_long_list_comes_in_pages() -> None:
    def create(api: FakeKube) -> None:
        for number in range(250):
            api.create(f"p{number}", f"127.0.{number // 100 + 1}.{number % 100 + 1}")

    with kube_scene(create) as scene:
        scene.until(lambda: len(scene.fleet) == 250)
        assert [query.get("continue") for query in scene.api.lists] == [None, "100", "200"]
        assert scene.report.passes == 1


def test_two_routers_follow_one_namespace() -> None:
    with kube_scene(engines(1)) as one, kube_scene() as other:
        one.until_urls(url(1))
        other.api.pods = one.api.pods
        other.do(other.api.cut)
        other.until_urls(url(1))


# -- workers of others -------------------------------------------------------------------------------------------------


def test_a_worker_of_an_operator_is_never_touched(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), kube_scene() as scene:
        scene.until(lambda: len(scene.api.watching) == 1)
        mine = scene.router.add(url(1), health=DEFAULTS.health, model_id="mine")
        scene.do(lambda: engines(1, 2)(scene.api), lambda: scene.api.change("p1", ready=False))
        scene.until_urls(url(1), url(2))
        scene.do(lambda: scene.api.change("p1", ready=True))
        scene.do(lambda: scene.api.create("p3", "127.0.0.3"))
        scene.until_urls(url(1), url(2), url(3))
        scene.do(lambda: scene.api.delete("p1"), lambda: scene.api.delete("p2"))
        scene.until_urls(url(1), url(3))
        assert scene.worker(url(1)) is mine
        assert (mine.spec.source, mine.spec.model_id, mine.withheld) == (Source.API, "mine", "")
        said = [record.getMessage() for record in caplog.records if "is known from api already" in record.getMessage()]
        assert said == [f"kubernetes: {url(1)} is known from api already, and stays as it is there (llm/p1)"]


def test_a_worker_that_an_operator_removed_stays_out_until_its_pod_is_another() -> None:
    with kube_scene(engines(1, 2)) as scene:
        scene.until_urls(url(1), url(2))
        assert scene.router.post("/remove_worker", url=url(1)).status == 200
        scene.do(lambda: scene.api.create("p3", "127.0.0.3"))
        scene.until_urls(url(2), url(3))
        scene.do(scene.api.cut)
        scene.until(lambda: len(scene.api.lists) == 2 and len(scene.api.watching) == 1)
        assert scene.urls() == [url(2), url(3)]
        scene.do(lambda: scene.api.delete("p1"), lambda: scene.api.create("p1", "127.0.0.1"))
        scene.until_urls(url(1), url(2), url(3))


def test_what_an_operator_changes_stays_until_the_pod_says_something_else() -> None:
    rules = msgspec.structs.replace(ENGINES, model=("label", "m"))
    labels: dict[str, Any] = {"app": "engine", "m": "one"}
    with kube_scene(lambda api: api.create("p1", "127.0.0.1", labels), rules) as scene:
        scene.until_urls(url(1))
        worker = scene.worker(url(1))
        changed = scene.router.ask(
            "PUT", f"/workers/{worker.id}", b'{"priority":7,"model_id":"own"}', content_type="application/json"
        )
        assert changed.status == 202
        scene.do(lambda: scene.api.create("p2", "127.0.0.2", labels))
        scene.until_urls(url(1), url(2))
        assert (worker.spec.priority, worker.spec.model_id) == (7, "own")
        scene.do(lambda: scene.api.change("p1", labels=labels | {"m": "two"}))
        scene.until(lambda: worker.spec.model_id == "two")
        assert (worker.spec.priority, worker.spec.instance) == (7, "uid-1")
