"""Lists of what workers keep: one list of all, in pages that show each entry once, and what is said of gaps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from fake_worker import CLOSE, FakeWorker, Gate, Seen, answer
from sglang_router.admin.lists import MOST_ENTRIES
from stack import Stack, stack

FILES = "/v1/files"


class Lister(FakeWorker):
    """An engine that keeps files and lists them in pages.

    files  ids, in the order in which it lists them
    page   entries of a page for which no limit is asked
    pages  whether it knows `after` and `limit`; else it always lists all
    """

    def __init__(self, files: list[str], page: int = 100, pages: bool = True) -> None:
        super().__init__()
        self.files = files
        self.page = page
        self.pages = pages

    def reply_to(self, seen: Seen, scripted: bytes | Gate) -> bytes | Gate:
        """Return what it answers."""
        parts = urlsplit(seen.route.partition(" ")[2])
        if parts.path != FILES:
            known = parts.path.removeprefix(f"{FILES}/") in self.files
            return answer(200, {"id": "it"}) if known else scripted
        query = parse_qs(parts.query)
        after, limit = query.get("after", [""])[0], int(query.get("limit", [str(self.page)])[0])
        if not self.pages:
            return listed(self.files, False)
        begin = self.files.index(after) + 1 if after in self.files else 0
        return listed(self.files[begin : begin + limit], len(self.files) > begin + limit)


class Endless(Lister):
    """Lists all its files, and says that there are more."""

    def reply_to(self, seen: Seen, scripted: bytes | Gate) -> bytes | Gate:
        found = super().reply_to(seen, scripted)
        return listed(self.files, True) if seen.route.partition("?")[0] == f"GET {FILES}" else found


def listed(files: list[str], more: bool) -> bytes:
    data = [{"id": name, "object": "file", "bytes": 1.50} for name in files]
    return answer(200, {"object": "list", "data": data, "has_more": more})


def listers(router: Stack, *made: Lister) -> None:
    for lister in made:
        router.run(lister.start())
        router.join(lister)


def get(router: Stack, query: str = "") -> dict[str, Any]:
    reply = router.get(FILES + query)
    assert reply.status == 200, reply
    found: dict[str, Any] = reply.json()
    return found


def ids(found: Mapping[str, Any]) -> list[str]:
    return [entry["id"] for entry in found["data"]]


def pages(router: Stack, query: str) -> list[list[str]]:
    """All pages, as a client follows them."""
    found = [get(router, f"?{query}")]
    while found[-1]["has_more"]:
        assert len(found) < 20, "this has no end"
        found.append(get(router, f"?{query}&after={found[-1]['last_id']}"))
    return [ids(page) for page in found]


def test_the_lists_of_all_workers_are_one() -> None:
    with stack() as router:
        listers(router, Lister(["a", "b"]), Lister([]), Lister(["c"]))
        found = get(router)
        assert ids(found) == ["a", "b", "c"]
        assert (found["first_id"], found["last_id"], found["has_more"]) == ("a", "c", False)
        assert found["data"][0] == {"id": "a", "object": "file", "bytes": 1.50}
        assert "unavailable_workers" not in found


def test_without_entries_there_is_an_empty_list() -> None:
    with stack() as router:
        listers(router, Lister([]))
        assert get(router) == {"object": "list", "data": [], "has_more": False}


@pytest.mark.parametrize("known", [True, False], ids=["engines know pages", "engines list all"])
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 100])
def test_who_follows_the_pages_sees_each_entry_once(limit: int, known: bool) -> None:
    with stack() as router:
        made = Lister(["a", "b", "c"], pages=known), Lister([], pages=known), Lister(["d", "e", "f", "g"], pages=known)
        listers(router, *made)
        found = pages(router, f"limit={limit}")
        assert [name for page in found for name in page] == list("abcdefg")
        assert all(len(page) <= limit for page in found)


@pytest.mark.parametrize("limit", [1, 2, 3, 10])
def test_workers_that_share_their_files_list_each_once(limit: int) -> None:
    with stack() as router:
        listers(router, Lister(["a", "b", "c"]), Lister(["a", "b", "c"]), Lister(["d"]))
        assert [*chain(*pages(router, f"limit={limit}"))] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("limit", [1, 2, 10])
def test_an_entry_that_an_engine_lists_twice_leads_nobody_in_a_circle(limit: int) -> None:
    with stack() as router:
        listers(router, Lister(["a", "a", "b"], pages=False), Lister(["c"]))
        assert [*chain(*pages(router, f"limit={limit}"))] == ["a", "b", "c"]


def test_a_worker_that_always_says_that_there_is_more_does_not_hide_the_next_one() -> None:
    with stack() as router:
        listers(router, Endless(["a", "b"], pages=False), Endless([], pages=False), Lister(["c"]))
        assert [*chain(*pages(router, ""))] == ["a", "b", "c"]


def test_a_page_of_countless_entries_is_cut() -> None:
    with stack() as router:
        listers(router, Lister([f"{number}" for number in range(MOST_ENTRIES + 5)], page=1 << 20, pages=False))
        found = get(router)
        assert (len(found["data"]), found["has_more"], found["last_id"]) == (MOST_ENTRIES, True, f"{MOST_ENTRIES - 1}")
        rest = get(router, f"?after={found['last_id']}")
        assert (len(rest["data"]), rest["has_more"]) == (5, False)


def test_without_a_limit_a_page_ends_where_that_of_an_engine_ends() -> None:
    with stack() as router:
        listers(router, Lister(["a", "b", "c"], page=2), Lister(["d"], page=2))
        assert pages(router, "order=asc") == [["a", "b"], ["c", "d"]]


def test_each_worker_gets_the_query_but_after_only_who_keeps_what_it_names() -> None:
    with stack() as router:
        one, two, three = Lister(["a"]), Lister(["b", "c"]), Lister(["d"])
        listers(router, one, two, three)
        assert ids(get(router, "?purpose=batch%20x&after=b")) == ["c", "d"]
        routes = [[seen.route for seen in each.seen if FILES in seen.route] for each in (one, two, three)]
        assert routes == [
            [f"GET {FILES}/b"],
            [f"GET {FILES}/b", f"GET {FILES}?purpose=batch+x&after=b"],
            [f"GET {FILES}/b", f"GET {FILES}?purpose=batch+x"],
        ]


@pytest.mark.parametrize("after", ["nobody", "..%2Fworkers", "%00", "..", "."])
def test_what_nobody_keeps_begins_no_page(after: str) -> None:
    with stack() as router:
        listers(router, Lister(["a"]))
        reply = router.get(f"{FILES}?after={after}")
        assert (reply.status, reply.json()["error"]["param"]) == (404, "after")


@pytest.mark.parametrize("limit", ["0", "-1", "x", "", "10001", "1e3", "%D9%A3"])
def test_a_bad_limit_reaches_no_engine(limit: str) -> None:
    with stack() as router:
        lister = Lister(["a"])
        listers(router, lister)
        reply = router.get(f"{FILES}?limit={limit}")
        assert (reply.status, reply.json()["error"]["param"]) == (400, "limit")
        assert not [seen for seen in lister.seen if FILES in seen.route]


@pytest.mark.parametrize(
    "bad",
    [CLOSE, answer(500), answer(200, b"nonsense"), answer(200, {"data": 7}), answer(200, b" " * (1 << 23))],
    ids=["closed", "500", "no JSON", "no list", "too long"],
)
def test_a_worker_that_does_not_answer_is_counted(bad: bytes) -> None:
    with stack() as router:
        lister = Lister(["a"])
        listers(router, lister)
        (fake,) = router.fakes({f"GET {FILES}": bad})
        found = get(router)
        assert (ids(found), found["unavailable_workers"]) == (["a"], 1)
        worker = router.worker(lister.url)
        router.call(lambda: router.fleet.remove(worker))
        reply = router.get(FILES)
        assert (reply.status, reply.json()["error"]["code"]) == (502, "worker_unreachable")
        fake.script[f"GET {FILES}"] = answer(404)
        assert router.get(FILES).status == 404


def test_an_engine_without_such_a_list_keeps_nothing() -> None:
    with stack() as router:
        listers(router, Lister(["a"]))
        router.fakes({}, {f"GET {FILES}": answer(405)})
        assert get(router) == {
            "object": "list",
            "data": [{"id": "a", "object": "file", "bytes": 1.5}],
            "first_id": "a",
            "last_id": "a",
            "has_more": False,
        }


def test_an_engine_that_wants_another_key_says_so() -> None:
    with stack() as router:
        router.fakes({f"GET {FILES}": answer(401, {"error": "a key, please"})})
        assert (router.get(FILES).status, router.get(FILES).json()) == (401, {"error": "a key, please"})


def test_a_long_page_is_read_too() -> None:
    names = [f"file-{number:05}" for number in range(9_000)]
    with stack() as router:
        listers(router, Lister(names, page=10_000), Lister([f"other-{name}" for name in names[:2000]], page=10_000))
        found = get(router)
        assert (len(found["data"]), found["has_more"]) == (10_000, True)


def test_ollamas_models_are_those_of_all() -> None:
    def tags(*names: str) -> bytes:
        return answer(200, json.dumps({"models": [{"name": name, "of": names[0]} for name in names]}).encode())

    with stack() as router:
        router.fakes(
            {"GET /api/tags": tags("a", "b"), "GET /api/ps": tags("a")},
            {"GET /api/tags": tags("b", "c"), "GET /api/ps": tags("a")},
            {},
        )
        found = router.get("/api/tags").json()
        assert [(each["name"], each["of"]) for each in found["models"]] == [("a", "a"), ("b", "a"), ("c", "b")]
        assert [each["name"] for each in router.get("/api/ps").json()["models"]] == ["a", "a"]


def test_without_ollama_its_errors_have_its_shape() -> None:
    with stack() as router:
        router.fakes({})
        reply = router.get("/api/tags")
        assert (reply.status, reply.json()) == (
            404,
            {"error": "No worker has /api/tags: their engines do not know it."},
        )
