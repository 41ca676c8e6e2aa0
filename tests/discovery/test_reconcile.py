"""The difference between what a source wants and what is there, and what it leads to, whatever happens in between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_router.discovery.reconcile import (
    ADD,
    AMEND,
    DISMISSED,
    FOREIGN,
    REMOVE,
    REPLACE,
    WITHHOLD,
    Present,
    Step,
    WantedWorker,
    difference,
)
from sglang_router.routing.source import Source

MINE, OTHER = Source.KUBERNETES, Source.API
A = "http://a:1"
HERE = Present(MINE, "u1", "")


def want(url: str = A, instance: str = "u1", addable: bool = True, withheld: str = "", **said: object) -> WantedWorker:
    return WantedWorker(url=url, said=said, instance=instance, addable=addable, withheld=withheld)


def acts(wanted: WantedWorker | None, present: Present | None, told: WantedWorker | None = None) -> list[str]:
    """Return what is to be done about A."""
    steps = difference(
        MINE,
        {} if wanted is None else {A: wanted},
        {} if present is None else {A: present},
        {} if told is None else {A: told},
    )
    assert all(step.url == A for step in steps)
    return [step.act for step in steps]


def test_the_table() -> None:
    unready, ready = want(addable=False, withheld="its pod is not ready"), want()
    assert acts(ready, None) == [ADD]
    assert acts(unready, None) == []
    assert acts(ready, HERE, ready) == []
    assert acts(unready, HERE, ready) == [WITHHOLD]
    assert acts(ready, HERE._replace(withheld="x"), ready) == [WITHHOLD]
    assert acts(want(model_id="m"), HERE, ready) == [AMEND]
    assert acts(ready, HERE) == [AMEND]  # after a restart nobody knows what it said before
    assert acts(want(instance="u2"), HERE, ready) == [REPLACE]
    assert acts(want(instance="u2", addable=False), HERE, ready) == [REMOVE]
    assert acts(None, HERE, ready) == [REMOVE]
    assert acts(ready, Present(OTHER, "", "")) == [FOREIGN]
    assert acts(unready, Present(OTHER, "", "")) == []
    assert acts(None, Present(OTHER, "", "")) == []
    assert acts(ready, None, ready) == [DISMISSED]
    assert acts(want(instance="u2"), None, ready) == [ADD]


def test_what_is_removed_comes_last() -> None:
    steps = difference(MINE, {A: want()}, {"http://b:1": HERE}, {})
    assert [(step.act, step.url) for step in steps] == [(ADD, A), (REMOVE, "http://b:1")]


URLS = [f"http://{name}:1" for name in "abcd"]
STATES = st.sampled_from([(True, ""), (False, "its pod is not ready"), (False, "its pod ends")])
WANTED = st.dictionaries(
    st.sampled_from(URLS),
    st.tuples(st.sampled_from(["u1", "u2"]), STATES, st.sampled_from(["one", "two"])),
)
MEDDLING = st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from(URLS)), max_size=3)


class Model:
    """What a router does with the steps, and what operators do beside it."""

    def __init__(self) -> None:
        self.present: dict[str, Present] = {}
        self.said: dict[str, object] = {}
        self.told: dict[str, WantedWorker] = {}
        self.removed: dict[str, str] = {}  # by an operator: the instance

    def meddle(self, what: str, url: str) -> None:
        """An operator adds or removes a worker."""
        there = self.present.get(url)
        if what == "add" and there is None:
            self.present[url] = Present(OTHER, "", "")
        elif what == "remove" and there is not None:
            del self.present[url]
            if there.source is MINE:
                self.removed[url] = there.instance

    def follow(self, wanted: dict[str, WantedWorker]) -> list[Step]:
        """Make a pass."""
        steps = difference(MINE, wanted, self.present, self.told)
        for step in steps:
            self.apply(step)
        self.told = {url: each for url, each in self.told.items() if url in wanted}
        idle = {step.url for step in steps if step.act in (FOREIGN, DISMISSED)}
        mine = {url for url, there in self.present.items() if there.source is MINE}
        self.told |= {url: each for url, each in wanted.items() if url in mine - idle}
        return steps

    def apply(self, step: Step) -> None:
        url, each = step.url, step.wanted
        if step.act in (ADD, REPLACE, AMEND, WITHHOLD):
            assert each is not None
            assert (step.act == ADD) == (url not in self.present)
            self.present[url] = Present(MINE, each.instance, self.withheld_by(step, each))
            self.said[url] = each.said
        elif step.act == REMOVE:
            assert self.present.pop(url).source is MINE
        else:
            assert url not in self.present or self.present[url].source is not MINE

    def withheld_by(self, step: Step, each: WantedWorker) -> str:
        return self.present[step.url].withheld if step.act == AMEND else each.withheld


@given(st.lists(st.tuples(MEDDLING, WANTED), max_size=6))
def test_a_pass_makes_the_workers_what_the_source_wants_and_touches_no_others(
    rounds: list[tuple[list[tuple[str, str]], dict[str, tuple[str, tuple[bool, str], str]]]],
) -> None:
    model = Model()
    for meddling, description in rounds:
        for what, url in meddling:
            model.meddle(what, url)
        wanted = {
            url: want(url, instance, addable, withheld, model_id=said)
            for url, (instance, (addable, withheld), said) in description.items()
        }
        others = {url: there for url, there in model.present.items() if there.source is OTHER}
        kept = {url for url, there in model.present.items() if there.source is MINE}
        model.follow(wanted)
        assert {url: there for url, there in model.present.items() if there.source is OTHER} == others
        mine = {url: there for url, there in model.present.items() if there.source is MINE}
        assert mine.keys() <= wanted.keys()
        for url, each in wanted.items():
            dismissed = url in model.told and url not in model.present
            if url in mine:
                assert (mine[url].instance, mine[url].withheld) == (each.instance, each.withheld)
                assert model.said[url] == each.said
                assert each.addable or url in kept  # one that may not be added was there
            else:
                assert url in others or dismissed or not each.addable or each.instance == model.removed.get(url)
        again = model.follow(wanted)  # a second pass with the same has nothing to do
        assert {step.act for step in again} <= {FOREIGN, DISMISSED}
