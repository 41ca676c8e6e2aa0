"""The page for operators: what GET / answers to whom, its stream, and what may not be changed from other pages."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import msgspec
import pytest

from fake_worker import answer
from sglang_router.access.permissions import Access
from sglang_router.admin.live import MOST_VIEWERS, Frame
from sglang_router.admin.worker_row import COLUMNS
from sglang_router.config.keys import control_keys
from sglang_router.version import __version__
from stack import WITHIN, Stack, stack

BROWSER = "text/html,application/xhtml+xml,*/*;q=0.8"
ADMIN, USER = "admin-key", "user-key"
OK = {"POST /generate": answer(200, {"text": "x", "meta_info": {"prompt_tokens": 10, "cached_tokens": 4}})}


def keyed() -> Access:
    return Access((), control_keys([f"ops:Ops:admin:{ADMIN}", f"dev:Dev:user:{USER}"]))


class Viewer:
    """A client that reads the stream."""

    def __init__(self, router: Stack, **headers: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=WITHIN)
        fields = {"accept": "text/event-stream"} | {name.replace("_", "-"): v for name, v in headers.items()}
        self.connection.request("GET", "/overview", headers=fields)
        self.answer = self.connection.getresponse()

    def event(self) -> tuple[str, dict[str, Any]]:
        """Return the name of the next event, "" for none, and its data."""
        name, data = "", ""
        while (line := self.answer.readline().decode().rstrip("\n")) or not data:
            assert line or not self.answer.isclosed(), "the stream ended"
            field, _, value = line.partition(": ")
            name, data = (value, data) if field == "event" else (name, value)
        found: dict[str, Any] = json.loads(data)
        return name, found

    def hello(self) -> dict[str, Any]:
        name, data = self.event()
        assert name == "hello"
        return data

    def frame(self) -> Frame:
        name, data = self.event()
        assert name == ""
        return msgspec.convert(data, Frame)

    def close(self) -> None:
        self.connection.close()
        self.answer.close()


@contextlib.contextmanager
def viewing(router: Stack, **headers: str) -> Iterator[Viewer]:
    with contextlib.closing(Viewer(router, **headers)) as viewer:
        yield viewer


def until_nobody_looks(router: Stack) -> None:
    """Closed connections are seen a moment later; ask until they are: each answer is a turn of the loop."""
    for _ in range(100_000):
        if not router.call(lambda: router.context.live.viewers):
            return
    raise AssertionError("a viewer is still counted")


# -- GET / -------------------------------------------------------------------------------------------------------------


def test_a_program_gets_a_name_and_links_that_exist() -> None:
    with stack() as router:
        told = router.get("/")
        assert told.headers["content-type"] == "application/json"
        assert (told.json()["name"], told.json()["version"]) == ("sglang-router", __version__)
        for path in told.json()["links"].values():
            assert router.get(path).status != 404, path


def test_a_browser_gets_the_page_under_a_policy_that_allows_nothing_else() -> None:
    with stack(access=keyed()) as router:  # the page has no figures: it needs no key
        reply = router.get("/", accept=BROWSER)
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    directives = dict(each.split(" ", 1) for each in reply.headers["content-security-policy"].split("; "))
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", reply.text, re.DOTALL)
        assert directives[f"{kind}-src"] == f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
    assert directives["default-src"] == directives["frame-ancestors"] == directives["form-action"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["cache-control"] == "no-store"
    assert "accept" in reply.headers["vary"]


def test_the_page_loads_nothing_from_elsewhere_and_has_no_inline_handlers_or_styles() -> None:
    with stack() as router:
        page = router.get("/", accept=BROWSER).text
    assert re.findall(r"""(?:src|href|action)=["'](?!data:,|#)""", page) == []
    assert re.findall(r"\s(?:on\w+|style)=[\"']", page) == []
    assert re.findall(r"innerHTML|insertAdjacentHTML|eval\(|document\.write|localStorage|document\.cookie", page) == []
    urls = set(re.findall(r"https?://[\w.]+", page)) - {"http://10.0.0.1", "http://www.w3.org"}
    assert urls == set()


@pytest.mark.parametrize(("key", "told"), [("", False), ("wrong", False), (USER, True), (ADMIN, True)])
def test_the_version_is_for_those_who_may_read(key: str, told: bool) -> None:
    with stack(access=keyed()) as router:
        reply = router.get("/", **({"authorization": f"Bearer {key}"} if key else {}))
    assert (reply.status, "version" in reply.json()) == (200, told)


# -- GET /overview -----------------------------------------------------------------------------------------------------


def test_it_needs_the_key_of_a_reader() -> None:
    with stack(access=keyed()) as router:
        assert router.get("/overview").status == 401
        assert router.get("/overview", authorization="Bearer wrong").status == 401
        assert router.get("/overview", authorization=f"Bearer {USER}").status == 200


@pytest.mark.parametrize(("key", "changes", "why"), [(USER, False, "role admin"), (ADMIN, True, "")])
def test_a_stream_begins_with_what_its_viewer_may(key: str, changes: bool, why: str) -> None:
    with stack(access=keyed()) as router, viewing(router, authorization=f"Bearer {key}") as viewer:
        hello = viewer.hello()
    assert hello["changes"] is changes
    assert why in hello["why"]


def test_a_stream_follows_the_rights_of_its_key() -> None:
    """A key that is taken away, or expires, sees no further frame; one with another role is told so."""
    with stack(access=keyed()) as router, viewing(router, authorization=f"Bearer {ADMIN}") as viewer:
        access = router.context.access
        assert viewer.hello()["changes"]
        viewer.frame()
        router.call(lambda: access.use((), control_keys([f"ops:Ops:user:{ADMIN}"])))
        told = next(data for name, data in iter(viewer.event, None) if name == "hello")
        assert not told["changes"]
        assert "role admin" in told["why"]
        viewer.frame()
        router.call(lambda: access.use((), control_keys([f"dev:Dev:user:{USER}"])))
        left = list(itertools.islice(iter(viewer.answer.readline, b""), 30))
        assert len(left) < 30, "the stream goes on"
        until_nobody_looks(router)
        assert router.ask("GET", "/overview", authorization=f"Bearer {ADMIN}").status == 401


def test_without_keys_this_machine_may_change_and_other_pages_may_not() -> None:
    with stack() as router:
        with viewing(router) as viewer:
            assert viewer.hello()["changes"]
        with viewing(router, origin="http://elsewhere.example") as viewer:
            assert "from this machine only" in viewer.hello()["why"]


def test_the_first_frame_is_whole_and_the_next_has_what_changed() -> None:
    with stack() as router:
        first, second = router.fakes(OK, OK)
        with viewing(router) as viewer:
            viewer.hello()
            whole = viewer.frame()
            assert whole.whole
            assert {row.url for row in whole.rows} == {first.url, second.url}
            assert whole.columns == COLUMNS
            assert [event.what for event in whole.events].count("added") == 2
            worker = router.worker(second.url)
            router.call(lambda: router.fleet.set_draining(worker, True))
            frame = viewer.frame()
            while not frame.rows:
                frame = viewer.frame()
            (row,) = frame.rows
            assert not frame.whole
            assert (row.url, row.state, row.draining) == (second.url, "draining", True)
            assert "no new requests" in row.why
            assert frame.decisions is None
            (event,) = frame.events
            assert (event.what, event.new, event.worker) == ("draining", "draining", second.url)
            router.call(lambda: router.fleet.remove(worker))
            while not frame.gone:
                frame = viewer.frame()
            assert frame.gone == [worker.id]


def test_requests_show_in_figures_rows_and_decisions() -> None:
    with stack() as router:
        (fake,) = router.fakes(OK)
        with viewing(router) as viewer:
            viewer.hello()
            viewer.frame()
            for _ in range(3):
                assert router.post("/generate", {"text": "hello"}).status == 200
            frame = viewer.frame()
            while not frame.rows or not frame.decisions or len(frame.decisions) < 3:
                frame = viewer.frame()
            row = frame.rows[-1]
            assert (row.url, row.cached) == (fake.url, 0.4)
            assert row.requests > 0
            assert row.ttft is not None
            assert frame.now.requests > 0
            assert frame.now.cached == 0.4
            assert frame.now.ttft_p50 is not None
            assert {each.worker for each in frame.decisions} == {fake.url}


def test_a_viewer_that_asks_once_gets_everything_in_json() -> None:
    with stack() as router:
        (fake,) = router.fakes(OK)
        frame = msgspec.json.decode(router.get("/overview").body, type=Frame)
        until_nobody_looks(router)
        assert not router.call(lambda: router.context.live.witness.watched)
    assert frame.whole
    assert [row.url for row in frame.rows] == [fake.url]
    assert (frame.now.healthy, frame.now.workers, frame.version) == (1, 1, __version__)


def test_all_viewers_share_one_assembly_and_their_number_is_bounded() -> None:
    with stack() as router, contextlib.ExitStack() as opened:
        viewers = [opened.enter_context(viewing(router)) for _ in range(MOST_VIEWERS)]
        for viewer in viewers:
            viewer.hello()
        seen = [viewer.frame().frame for viewer in viewers]
        assert max(seen) - min(seen) < MOST_VIEWERS  # one assembly for each of them would be as many frames
        refused = router.get("/overview", accept="text/event-stream")
        assert (refused.status, refused.headers["retry-after"]) == (429, "10")
        assert "Close one" in refused.json()["error"]["message"]
        opened.close()
        until_nobody_looks(router)
        assert router.get("/overview").status == 200


def test_no_worker_key_is_in_a_frame() -> None:
    with stack() as router:
        router.add("http://127.0.0.1:9", api_key="a-secret-of-an-engine")
        body = router.get("/overview").body
    assert b"127.0.0.1:9" in body
    assert b"a-secret-of-an-engine" not in body


def test_a_head_request_ends() -> None:
    with stack() as router:
        assert router.ask("HEAD", "/overview", accept="text/event-stream").status == 200
        until_nobody_looks(router)


def test_streams_end_when_the_router_does_and_no_new_one_begins() -> None:
    with stack() as router, viewing(router) as viewer:
        viewer.hello()
        viewer.frame()
        router.call(lambda: setattr(router.context, "ending", True))
        assert viewer.answer.read().count(b"data: ") <= 2
        assert router.get("/overview").status == 503


def test_a_fault_in_the_assembly_is_an_error_and_the_next_viewer_is_served() -> None:
    with stack() as router:
        live = router.context.live
        totals = live._counters.totals

        def broken() -> Any:
            raise RuntimeError("a fault of a test")

        router.call(lambda: setattr(live._counters, "totals", broken))
        assert router.get("/overview").status == 500
        router.call(lambda: setattr(live._counters, "totals", totals))
        assert router.get("/overview").status == 200


# -- changes from other pages ------------------------------------------------------------------------------------------

FOREIGN = [
    {"origin": "http://elsewhere.example"},
    {"origin": "null"},
    {"sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "same-site", "origin": "http://elsewhere.example"},
    {"user_agent": "Mozilla/5.0"},
    {"origin": "http://elsewhere.example", "authorization": "Bearer of-no-use-here"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("route", ["POST /workers/{}/drain", "GET /flush_cache"])
def test_a_page_from_elsewhere_changes_nothing_where_no_key_is_needed(headers: dict[str, str], route: str) -> None:
    with stack(access=Access(open=True)) as router:
        (fake,) = router.fakes({"GET /flush_cache": answer(200), "POST /flush_cache": answer(200)})
        method, _, path = route.format(router.worker(fake.url).id).partition(" ")
        reply = router.ask(method, path, None, **headers)
        assert (reply.status, reply.json()["error"]["code"]) == (403, "forbidden")
        assert not router.worker(fake.url).draining


def test_the_routers_own_page_and_programs_change_where_no_key_is_needed() -> None:
    with stack(access=Access(open=True)) as router:
        (fake,) = router.fakes(OK)
        path = f"/workers/{router.worker(fake.url).id}/drain"
        own = {
            "origin": f"http://127.0.0.1:{router.port}",
            "sec_fetch_site": "same-origin",
            "user_agent": "Mozilla/5.0",
        }
        assert router.ask("POST", path, None, **own).status == 200
        assert router.ask("POST", path, user_agent="Mozilla/5.0", x_sglang_router_page="1").status == 200
        assert router.ask("POST", path, user_agent="curl/8").status == 200


REBOUND = [
    {"user_agent": "Mozilla/5.0", "accept_language": "en"},
    {"user_agent": "curl/8", "accept_language": "en", "authorization": "Bearer any", "x_sglang_router_page": "1"},
    {"user_agent": "Mozilla/5.0", "origin": "http://evil.example:30000", "x_sglang_router_page": "1"},
]
"""What a page of evil.example sends once that name points to the router: all of it is of its own origin."""


@pytest.mark.parametrize("headers", REBOUND)
def test_a_page_whose_name_was_made_to_point_here_sees_and_changes_nothing_without_a_key(
    headers: dict[str, str],
) -> None:
    with stack(access=Access(open=True)) as router:
        (fake,) = router.fakes({**OK, "POST /flush_cache": answer(200)})
        path = f"/workers/{router.worker(fake.url).id}/drain"
        for route in (f"POST {path}", "GET /flush_cache", "GET /overview", "GET /workers", "GET /metrics"):
            method, _, target = route.partition(" ")
            reply = router.ask(method, target, None, host="evil.example:30000", **headers)
            assert (reply.status, reply.json()["error"]["code"]) == (403, "host_not_allowed"), target
            assert "'evil.example:30000'" in reply.json()["error"]["message"]
            assert "--control-plane-allowed-hosts" in reply.json()["error"]["message"]
        assert "version" not in router.get("/", host="evil.example:30000", **headers).json()
        assert not router.worker(fake.url).draining
        assert fake.count("POST /flush_cache") == 0
        inference = headers | {"content_type": "application/json", "host": "evil.example:30000"}
        assert router.ask("POST", "/generate", b'{"text": "x"}', **inference).status == 200
        assert router.get("/health", host="evil.example:30000", **headers).status == 200


def test_names_of_the_router_and_programs_may_see_what_needs_no_key() -> None:
    with stack(options={"control_plane_allowed_hosts": ["router.example.com"]}) as router:
        page = {"user_agent": "Mozilla/5.0", "accept_language": "en"}
        for host in ("router.example.com:30000", "gpu-box:30000", f"127.0.0.1:{router.port}"):
            assert router.get("/overview", host=host, **page).status == 200, host
        assert router.get("/overview", host="evil.example", user_agent="Prometheus/3").status == 200


def test_where_the_control_plane_has_keys_any_name_will_do() -> None:
    with stack(access=keyed()) as router:
        page = {"user_agent": "Mozilla/5.0", "host": "evil.example"}
        assert router.get("/workers", **page).status == 401
        assert router.get("/workers", authorization=f"Bearer {USER}", **page).status == 200


def test_a_key_is_enough_for_any_page() -> None:
    """A browser adds no key by itself, so a page that sends one was given it."""
    with stack(access=keyed()) as router:
        (fake,) = router.fakes(OK)
        path = f"/workers/{router.worker(fake.url).id}/drain"
        headers = {"authorization": f"Bearer {ADMIN}", "origin": "http://elsewhere.example"}
        assert router.ask("POST", path, None, **headers).status == 200


# -- what is assembled -------------------------------------------------------------------------------------------------


def test_a_viewer_that_missed_frames_gets_all_that_changed_meanwhile() -> None:
    with stack() as router, viewing(router) as other:
        fakes = router.fakes(OK, OK, OK)
        live = router.context.live
        other.hello()
        while len(first := other.frame().rows) < len(fakes):
            assert len(first) < len(fakes)
        seen, _ = router.run(live.next(0))
        for fake in fakes[:2]:
            worker = router.worker(fake.url)
            router.call(lambda worker=worker: router.fleet.set_draining(worker, True))  # type: ignore[misc]
            router.run(live.next(router.call(lambda: live._number)))
        _, late = router.run(live.next(seen))
        frame = msgspec.json.decode(late, type=Frame)
        assert not frame.whole
        assert {row.url for row in frame.rows if row.draining} == {fake.url for fake in fakes[:2]}
        assert [event.what for event in frame.events] == ["draining", "draining"]
        _, forgotten = router.run(live.next(seen - 1000))  # a number that is not remembered
        assert msgspec.json.decode(forgotten, type=Frame).whole


def test_a_point_is_kept_for_each_sample_also_while_nobody_looks() -> None:
    with stack() as router:
        router.fakes(OK)
        live = router.context.live

        def sample() -> None:
            while live.sample() < 1.0:
                pass

        router.call(sample)
        for _ in range(3):
            assert router.post("/generate", {"text": "hello"}).status == 200
        router.call(router.app.deferred.flush)
        router.call(sample)
        frame = msgspec.json.decode(router.get("/overview").body, type=Frame)
        (point,) = frame.points
        assert point.requests > 0
        assert (point.healthy, point.workers, point.cached) == (1, 1, 0.4)
        for _ in range(200):
            router.call(sample)
        with viewing(router) as viewer:
            viewer.hello()
            points = viewer.frame().points
            while len(points) < 180:  # the first frame may be one that was made for the question above
                points += viewer.frame().points
        assert len(router.call(lambda: list(live._points))) == 180


def test_the_tokens_of_a_removed_worker_still_count() -> None:
    with stack() as router:
        fake, _ = router.fakes(OK, OK)
        for _ in range(4):
            assert router.post("/generate", {"text": "hello"}).status == 200
        router.call(router.app.deferred.flush)

        def prompts() -> int:
            (*_, totals) = router.context.live._counters.totals()
            assert totals is not None
            return totals.prompt

        before = router.call(prompts)
        worker = router.worker(fake.url)
        router.call(lambda: router.fleet.remove(worker))
        router.call(router.app.deferred.flush)
        assert before == router.call(prompts) == 40


def test_only_the_last_events_are_kept() -> None:
    with stack() as router:
        witness = router.context.live.witness
        for n in range(300):
            router.call(lambda n=n: witness.note("reload", why=f"{n} {'x' * 1000}"))  # type: ignore[misc]
        events = msgspec.json.decode(router.get("/overview").body, type=Frame).events
    assert [event.number for event in events] == [*range(101, 301)]
    assert max(len(event.why) for event in events) == 300
