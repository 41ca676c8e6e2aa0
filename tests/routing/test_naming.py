"""Aliases, models that stand in for others, what an engine is told, and adapters that are loaded on some workers."""

from __future__ import annotations

import pytest

from fleets import Attempt, Bench, facts, spec
from sglang_router.errors import ModelNotFound, NoWorkers, Unavailable
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import Facts, read
from sglang_router.routing.model_names import LONGEST_TEXT, Names
from sglang_router.routing.naming import rename
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.queue import START
from sglang_router.routing.rules import FleetRules, QueueRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

CHAT = ENDPOINTS[b"/v1/chat/completions"]
GENERATE = ENDPOINTS[b"/generate"]
RESPONSES = ENDPOINTS[b"/v1/responses"]
PROMPT = b"a prompt that is long enough to count"


class Named:
    """A fleet whose models have other names, and stand in for each other."""

    def __init__(
        self,
        aliases: dict[str, str] | None = None,
        fallbacks: dict[str, tuple[str, ...]] | None = None,
        strict: bool = False,
        policy: str = "round_robin",
        queue: QueueRules | None = None,
        most_load: int = 0,
    ) -> None:
        self.bench = Bench(0, policy, rules=FleetRules(most_load=most_load, slow_start=0.0), assign=None, queue=queue)
        self.fleet = self.bench.fleet
        self.pools = self.fleet.pools
        self.bench.router.naming.use(aliases or {}, fallbacks or {}, strict)

    def add(
        self, name: str, *bases: str, adapters: tuple[str, ...] = (), given: str | None = None, checked: bool = False
    ) -> Worker:
        said = spec(name, checked=checked)
        worker = self.fleet.add(WorkerSpec(url=said.url, health=said.health, model_id=given), 0.0)
        self.fleet.announced(worker, Names(bases, adapters))
        return worker

    def route(self, body: Facts | str) -> Attempt:
        asked = read(CHAT, b'{"model":"%b","messages":[]}' % body.encode()) if isinstance(body, str) else body
        return self.bench.ask(asked).attempt

    def served(self, model: str) -> tuple[str, bytes]:
        """Send a request for a model; return which worker got it, and what its body was made to name."""
        attempt = self.route(model)
        attempt.end()
        return attempt.worker.url.removeprefix("http://").removesuffix(":1"), attempt.leg.model


# -- aliases -----------------------------------------------------------------------------------------------------------


def test_an_alias_goes_to_its_model_and_the_engine_is_told_the_name_it_knows() -> None:
    n = Named({"gpt-4": "A", "mini": "B"})
    n.add("a", "A")
    n.add("b", "B")
    assert n.served("gpt-4") == ("a", b'"A"')
    assert n.served("mini") == ("b", b'"B"')
    assert n.served("A") == ("a", b""), "a body that names the model stays as it is"


def test_an_engine_that_knows_the_alias_gets_the_body_as_it_is() -> None:
    n = Named({"gpt-4": "A"})
    n.add("knows", "A", "gpt-4")
    n.add("b", "B")
    assert n.served("gpt-4") == ("knows", b"")


def test_an_alias_works_while_the_fleet_serves_only_one_model() -> None:
    n = Named({"gpt-4": "A"})
    n.add("a", "A")
    assert n.pools.only is None
    assert (n.served("gpt-4"), n.served("anything")) == (("a", b'"A"'), ("a", b""))


def test_without_names_the_only_model_costs_a_request_nothing() -> None:
    n = Named()
    n.add("a", "A")
    found = [n.pools.only]
    for aliases in ({"x": "A"}, {}):
        n.bench.router.naming.use(aliases, {}, False)
        found.append(n.pools.only)
    assert found == [n.pools.default, None, n.pools.default]


def test_an_adapter_of_an_alias_is_that_of_the_model() -> None:
    n = Named({"gpt-4": "A"})
    n.add("plain", "A")
    n.add("lora", "A", adapters=("sql",))
    n.add("b", "B")
    assert n.served("gpt-4:sql") == ("lora", b'"A:sql"')


@pytest.mark.parametrize("more", [b"", b',"cache_salt":"s"', b',"lora_path":"l","cache_salt":"%b"' % (b"s" * 90)])
def test_an_alias_shares_the_prefixes_of_its_model(more: bytes) -> None:
    """The engine's cache knows only the model: what was read under one name is cached for the other."""
    n = Named({"gpt-4": "A"}, policy="cache_aware")
    n.add("a", "A")
    n.add("a2", "A")
    body = b'{"model":"%b","messages":[{"role":"user","content":"' + PROMPT + b'"}]' + more + b"}"
    first = n.route(read(CHAT, body % b"A"))
    again = n.route(read(CHAT, body % b"gpt-4"))
    assert (first.branch, again.branch, again.worker) == ("miss", "hit", first.worker)
    other = n.route(read(CHAT, body.replace(b'"s', b'"other') % b"gpt-4"))
    assert (other.branch == "miss") == bool(more)


def test_to_replace_an_alias_again_changes_nothing() -> None:
    n = Named({"gpt-4": "A"})
    n.add("a", "A")
    asked = facts(PROMPT, model=b'"gpt-4"')
    for _ in range(2):
        n.bench.router.naming.resolve(asked)
        assert (asked.model, asked.asked, asked.namespace) == (b'"A"', b'"gpt-4"', b'"A"')


def test_what_a_client_appends_to_an_alias_is_bounded() -> None:
    """A name that was cut has no quote at its end: put into a body, it would break it."""
    n = Named({"gpt-4": "A"})
    n.add("a", "A")
    asked = read(CHAT, b'{"model":"gpt-4:%b","messages":[]}' % (b"x" * LONGEST_TEXT))
    assert n.route(asked).leg.model == b""


def test_an_unknown_model_is_told_the_aliases_too() -> None:
    n = Named({"gpt-4": "A"})
    n.add("a", "A")
    n.add("b", "B")
    with pytest.raises(ModelNotFound, match=r"serves A, B, gpt-4\."):
        n.route("C")


# -- what an engine is called ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("announced", "given", "asked", "model", "told"),
    [
        (("A",), None, "A", "A", "A"),
        (("A",), None, "x", "A", "A"),
        (("A", "x"), None, "x", "A", "x"),
        (("A",), None, "x:sql", "A:sql", "A:sql"),
        (("x", "A"), None, "x:sql", "A:sql", "x:sql"),
        (("A",), "mine", "mine", "mine", "A"),
        (("A",), "mine", "x", "mine", "A"),
        (("A",), "mine", "mine:sql", "mine:sql", "A:sql"),
        (("A",), "mine", "A", "A", "A"),
        (("A",), "mine", "anything", "anything", "anything"),
        ((), "mine", "mine", "mine", "mine"),
        ((), None, "x", "A", "A"),
    ],
)
def test_what_an_engine_calls_a_model(
    announced: tuple[str, ...], given: str | None, asked: str, model: str, told: str
) -> None:
    worker = Named().add("w", *announced, given=given)
    assert worker.spoken(b'"%b"' % asked.encode(), b'"%b"' % model.encode()) == b'"%b"' % told.encode()


def test_a_worker_is_called_what_an_operator_says_and_its_engine_what_it_says_itself() -> None:
    n = Named()
    n.add("a", "A", given="mine")
    n.add("b", "B")
    n.add("same", "same", given="same")
    assert (n.served("mine"), n.served("A"), n.served("B")) == (("a", b'"A"'), ("a", b""), ("b", b""))
    assert n.served("same") == ("same", b"")


def test_a_rank_and_another_name_are_both_told() -> None:
    n = Named({"gpt-4": "A"})
    worker = n.fleet.add(WorkerSpec(url="http://a:1", dp_rank=1, health=spec("a").health), 0.0)
    n.fleet.announced(worker, Names(("A",)))
    leg = n.route("gpt-4").leg
    assert (leg.splice, leg.model) == (b'"data_parallel_rank":1', b'"A"')
    form = Facts(ENDPOINTS[b"/v1/audio/transcriptions"], model=b'"gpt-4"')
    leg = n.route(form).leg
    assert (leg.splice, leg.model) == (b"", b'"A"'), "members are not added to a form"


# -- models that stand in ----------------------------------------------------------------------------------------------


def test_a_fallback_serves_while_nobody_else_can() -> None:
    n = Named(fallbacks={"A": ("B",)})
    a = n.add("a", "A")
    n.add("b", "B")
    assert n.served("A") == ("a", b"")
    n.fleet.set_draining(a, True)
    assert n.served("A") == ("b", b'"B"')
    n.fleet.set_draining(a, False)
    assert n.served("A") == ("a", b""), "it is back"


def test_a_response_that_a_fallback_keeps_is_continued_there_after_the_model_is_back() -> None:
    n = Named({"gpt-4": "A"}, {"A": ("C", "B")})
    a, b = n.add("a", "A"), n.add("b", "B")
    n.add("c", "C")
    n.fleet.set_draining(a, True)
    for worker in n.pools.find(b'"C"').workers:
        n.fleet.set_draining(worker, True)

    def respond(model: str, previous: str = "") -> Attempt:
        more = f',"previous_response_id":"{previous}"' * bool(previous)
        return n.route(read(RESPONSES, f'{{"model":"{model}","input":"x"{more}}}'.encode()))

    first = respond("A")
    assert first.worker is b
    n.bench.router.holds(first.leg, b"resp_1")
    first.end()
    n.fleet.set_draining(a, False)
    for model in ("A", "gpt-4"):
        again = respond(model, "resp_1")
        assert (again.worker, again.leg.model, again.branch) == (b, b'"B"', "holder")
        again.end()
    for unknown in ("", "resp_2"):
        other = respond("A", unknown)
        assert other.worker is a
        other.end()
    n.fleet.set_draining(b, True)
    last = respond("A", "resp_1")
    assert last.worker is a, "it keeps this no more than any other, but it takes requests"
    last.end()


@pytest.mark.parametrize("others", [("C", "D"), ("B", "C")])
def test_a_model_without_workers_has_its_fallbacks_in_order(others: tuple[str, ...]) -> None:
    n = Named(fallbacks={"A": ("B", "C")})
    for other in others:
        n.add(other.lower(), other)
    first = next(each for each in others if each in "BC")
    assert n.served("A") == (first.lower(), b'"%b"' % first.encode())


def test_in_a_fleet_of_one_model_another_one_falls_back_to_it() -> None:
    n = Named(fallbacks={"A": ("B",)})
    n.add("b", "B")
    assert n.served("A") == ("b", b'"B"'), "vLLM would refuse the name A"
    assert n.served("X") == ("b", b""), "the engine decides about other names"


def test_a_starting_model_falls_back_and_a_full_one_does_not() -> None:
    n = Named(fallbacks={"A": ("B",)}, most_load=1)
    n.add("a", "A", checked=True)
    n.add("b", "B")
    assert n.served("A") == ("b", b'"B"')
    n.add("a2", "A")
    first = n.route("A")
    waiting = n.bench.ask(facts(model=b'"A"'))
    assert waiting.waits is not None
    first.end()
    n.bench.settle()
    assert waiting.attempt.worker is first.worker


def test_when_nobody_can_serve_the_error_is_that_of_the_model() -> None:
    n = Named(fallbacks={"A": ("B",)})
    a, b = n.add("a", "A"), n.add("b", "B")
    n.add("c", "C")
    for worker in (a, b):
        n.fleet.set_draining(worker, True)
    with pytest.raises(Unavailable):
        n.route("A")
    n.fleet.remove(a)
    n.fleet.remove(b)
    n.add("d", "D")
    with pytest.raises(ModelNotFound, match='model "A"'):
        n.route("A")
    with pytest.raises(NoWorkers):
        Named(fallbacks={"A": ("B",)}).route("A")


def test_a_request_that_waits_for_its_model_to_start_goes_to_the_fallback_that_comes() -> None:
    n = Named(fallbacks={"A": ("B",)})
    n.add("a", "A", checked=True)
    waiting = n.bench.ask(facts(PROMPT, model=b'"A"'))
    assert waiting.waits is not None
    assert waiting.waits[0] == START
    b = n.add("b", "B")
    n.bench.settle()
    assert (waiting.attempt.worker, waiting.attempt.leg.model) == (b, b'"B"')
    waiting.attempt.end()
    assert not n.bench.router.leases


def test_a_request_queued_for_a_place_falls_back_when_its_model_is_gone() -> None:
    n = Named(fallbacks={"A": ("B",)}, queue=QueueRules(max_concurrent=1, queue_size=3))
    a, b = n.add("a", "A"), n.add("b", "B")
    first = n.bench.ask(facts(model=b'"B"')).attempt
    waiting = n.bench.ask(facts(PROMPT, model=b'"A"'))
    n.fleet.set_draining(a, True)
    first.end()
    n.bench.settle()
    assert waiting.attempt.worker is b


def test_one_that_waits_for_room_waits_at_the_fallback_after_its_model_is_gone() -> None:
    n = Named(fallbacks={"A": ("B",)}, most_load=1)
    a, b = n.add("a", "A"), n.add("b", "B")
    first, other = n.route("A"), n.route("B")
    waiting = n.bench.ask(facts(PROMPT, model=b'"A"'))
    n.fleet.set_draining(a, True)
    n.bench.settle()
    assert waiting.waits is not None, "the fallback is full"
    first.end()
    n.bench.settle()
    assert waiting.waits is not None
    other.end()
    n.bench.settle()
    assert waiting.attempt.worker is b


def test_the_request_that_finds_the_worker_dead_is_retried_at_the_fallback() -> None:
    n = Named(fallbacks={"A": ("B",)})
    n.add("a", "A")
    b = n.add("b", "B")
    retried = n.route("A").retry(Outcome.REFUSED)
    assert retried is not None
    assert (retried.worker, retried.leg.model, retried.delay) == (b, b'"B"', 0.0)
    retried.end()
    assert not n.bench.router.leases


def test_a_worker_that_failed_once_is_asked_again_before_another_model() -> None:
    n = Named(fallbacks={"A": ("B",)})
    a = n.add("a", "A")
    n.add("b", "B")
    again = n.route("A").retry(Outcome.FAILED)
    assert again is not None
    assert again.worker is a


def test_another_model_never_goes_on_with_an_answer_that_has_begun() -> None:
    n = Named(fallbacks={"A": ("B",)})
    a = n.add("a", "A")
    n.add("b", "B")
    again = n.route("A").retry(Outcome.REFUSED, continued=True)
    assert again is not None
    assert again.worker is a
    assert n.route("A").retry(Outcome.BROKEN, continued=True) is None


def test_the_rest_of_a_stream_stays_with_the_model_that_began_it() -> None:
    """The facts of the rest are read anew, from a body with the client's name in it."""
    n = Named(fallbacks={"A": ("B",)})
    a = n.add("a", "A")
    n.add("b", "B")
    n.add("b2", "B")
    n.fleet.set_draining(a, True)
    begun = n.route("A")
    n.fleet.set_draining(a, False)
    begun.asked.facts = facts(PROMPT, model=b'"A"')
    rest = begun.retry(Outcome.BROKEN, continued=True)
    assert rest is not None
    assert (rest.worker.model, rest.leg.model) == ("B", b'"B"')
    assert rest.worker is not begun.worker


# -- strict ------------------------------------------------------------------------------------------------------------


def test_strict_names_in_a_fleet_of_one_model() -> None:
    n = Named(strict=True)
    with pytest.raises(NoWorkers):
        n.route("X")
    n.add("a", "A")
    assert n.served("A") == ("a", b"")
    assert n.route(facts(PROMPT)).worker.url == "http://a:1", "no model: the only one"
    with pytest.raises(ModelNotFound, match=r"serves A\."):
        n.route("X")
    n.add("silent")
    assert n.served("X") == ("silent", b""), "it announces nothing, so it may serve anything"


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [b'"model":"A",', b""])
def test_lora_path_prefers_workers_that_have_it_loaded(model: bytes) -> None:
    n = Named()
    n.add("plain", "A")
    n.add("lora", "A", adapters=("sql",))

    def serve(adapter: bytes) -> set[str]:
        body = b'{%b"text":"x","lora_path":"%b"}' % (model, adapter)
        return {n.route(read(GENERATE, body)).worker.url for _ in range(8)}

    assert serve(b"sql") == {"http://lora:1"}
    assert serve(b"new") == {"http://lora:1", "http://plain:1"}, "nobody has it: the engine may load it"


def test_lora_path_with_several_models() -> None:
    n = Named()
    n.add("a", "A", adapters=("sql",))
    n.add("a2", "A")
    n.add("b", "B", adapters=("sql", "law"))

    def serve(body: bytes) -> set[str]:
        return {n.route(read(GENERATE, body)).worker.url for _ in range(8)}

    assert serve(b'{"model":"B","text":"x","lora_path":"sql"}') == {"http://b:1"}
    assert serve(b'{"model":"A","text":"x","lora_path":"sql"}') == {"http://a:1"}
    assert serve(b'{"model":"A","text":"x","lora_path":"law"}') == {"http://a:1", "http://a2:1"}
    assert serve(b'{"text":"x","lora_path":"law"}') == {"http://b:1"}, "the adapter tells the model"
    with pytest.raises(ModelNotFound):
        serve(b'{"model":"C","text":"x","lora_path":"law"}')


@pytest.mark.parametrize("value", [b'["sql","sql"]', b"7", b'{"a":1}', b'"' + b"x" * 5000 + b'"', b'"', b"null"])
def test_any_lora_path_is_taken(value: bytes) -> None:
    n = Named({"gpt-4": "A"})
    n.add("a", "A", adapters=("sql",))
    n.add("a2", "A")
    body = b'{"model":"gpt-4","text":"x","lora_path":%b}' % value
    if value != b'"':
        asked = read(GENERATE, body)
        rename(asked, b'"A"')
        assert len(asked.namespace) <= 64
        assert n.route(read(GENERATE, body)).leg.model == b'"A"'
