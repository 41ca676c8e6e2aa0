"""What single clients and models may have: each limit, what is said, reloads; and that counters return to zero."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from event_makers import finished
from event_makers import tag as tag_of
from fleets import Bench, facts
from sglang_router.config import key_files, keys
from sglang_router.errors import (
    ConcurrencyLimited,
    ModelNotAllowed,
    Overload,
    QueueFull,
    RequestsLimited,
    TokensLimited,
)
from sglang_router.routing import quotas as quotas_module
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import Facts
from sglang_router.routing.model_names import text_of
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag, Target
from sglang_router.routing.quotas import Quotas
from sglang_router.routing.rules import ClientRules, LimitRules, ModelRules, QueueRules
from sglang_router.routing.usage import Usage
from sglang_router.wire import request_id

CHAT = ENDPOINTS[b"/v1/chat/completions"]


def of_model(model: str = "m") -> Facts:
    return Facts(CHAT, model=text_of(model) if model else b"")


class Clients:
    """Requests of clients, counted by one Quotas. Every request ends by `end`."""

    def __init__(self, **clients: ClientRules) -> None:
        self.quotas = Quotas()
        self.quotas.use_clients(clients)
        self._numbers = 0

    def ask(self, client: str = "alice", model: str = "m", now: float = 0.0) -> int:
        self._numbers += 1
        self.quotas.admit(tag_of(number=self._numbers, client=client, start=now), of_model(model), now)
        return self._numbers

    def tell(self, client: str = "alice", now: float = 0.0) -> str:
        """Ask, and return what the client is told of its limits."""
        self._numbers += 1
        made = tag_of(number=self._numbers, client=client, start=now)
        with contextlib.suppress(Overload):
            self.quotas.admit(made, of_model(), now)
        return made.limits.decode()

    def end(self, number: int, now: float = 0.0, usage: Usage | None = None) -> None:
        self.quotas.finished(finished(number=number, start=now, duration=0.0, usage=usage))


def limited(**limits: float | None) -> ClientRules:
    return ClientRules(LimitRules(**limits))  # type: ignore[arg-type]


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_rate_lets_a_burst_through_and_then_one_by_one() -> None:
    clients = Clients(alice=limited(requests_per_second=2.0, burst=3.0), bob=limited(requests_per_second=2.0))
    for _ in range(3):
        clients.ask(now=10.0)
    with pytest.raises(RequestsLimited, match="the key alice than 2 per second") as refused:
        clients.ask(now=10.1)
    assert (refused.value.status, refused.value.code) == (429, "requests_limited")
    assert refused.value.retry_after == pytest.approx(0.4)
    clients.ask("bob", now=10.1)
    clients.ask("carol", now=10.1)
    clients.ask(now=10.5)


def test_requests_in_flight_are_counted_until_their_end_once() -> None:
    clients = Clients(alice=limited(max_concurrent=2))
    first = clients.ask()
    clients.ask()
    with pytest.raises(ConcurrencyLimited, match="2 requests in flight of the key alice, and it may have 2") as refused:
        clients.ask()
    assert (refused.value.code, refused.value.retry_after) == ("concurrency_limited", 1.0)
    clients.end(first)
    clients.end(first)
    clients.ask()
    with pytest.raises(ConcurrencyLimited):
        clients.ask()


def test_tokens_are_counted_when_they_are_known() -> None:
    clients = Clients(alice=limited(tokens_per_minute=600.0))
    numbers = [clients.ask() for _ in range(3)]
    clients.end(numbers[0], usage=Usage(400, 300, 100))
    clients.ask()
    clients.end(numbers[1], usage=Usage(200, -1, 100))
    clients.end(numbers[2])  # an engine that tells nothing
    with pytest.raises(TokensLimited, match="the key alice are used up: it has 600 per minute") as refused:
        clients.ask()
    assert refused.value.code == "tokens_limited"
    assert refused.value.retry_after == pytest.approx(20.1)
    clients.ask(now=20.1)


@pytest.mark.parametrize(
    ("outcome", "status", "sent", "streaming", "tokens"),
    [
        (Outcome.SERVED, 200, 4000, True, 100 + 20),  # a stream without include_usage
        (Outcome.SERVED, 200, 400, False, 100 + 100),
        (Outcome.GONE, 200, 4000, True, 100 + 20),  # the client leaves just before the end
        (Outcome.GONE, 0, 0, True, 100),  # or before the first byte: its prompt is computed
        (Outcome.TIMEOUT, 200, 4000, True, 100 + 20),  # or does not read the last bytes
        (Outcome.FAILED, 502, 0, True, 0),
        (Outcome.REJECTED, 400, 90, False, 0),
        (Outcome.REFUSED, 0, 0, True, 0),
    ],
)
def test_tokens_that_nobody_tells_are_estimated(
    outcome: Outcome, status: int, sent: int, streaming: bool, tokens: int
) -> None:
    """Whoever left before the last event paid for nothing."""
    quotas = Quotas()
    quotas.use_clients({"alice": limited(tokens_per_minute=600.0)})
    quotas.admit(tag_of(number=1, client="alice"), Facts(CHAT, text=b"x" * 400), 0.0)
    leg = PlannedLeg(1, Target("http://a:1"), "")
    what = {"outcome": outcome, "status": status, "sent": sent, "duration": 0.0, "usage": None}
    quotas.finished(finished(leg, number=1, client="alice", start=0.0, streaming=streaming, **what))
    made = tag_of(number=2, client="alice")
    quotas.admit(made, Facts(CHAT), 0.0)
    assert b"x-ratelimit-remaining-tokens: %d\r\n" % (600 - tokens) in made.limits
    quotas.finished(finished(None, number=2, outcome=Outcome.GONE, status=0, duration=0.0, usage=None))
    quotas.admit(made := tag_of(number=3, client="alice"), Facts(CHAT, text=b"x" * 400), 0.0)
    quotas.finished(finished(None, number=3, outcome=Outcome.GONE, status=0, duration=0.0, usage=None))
    quotas.admit(made := tag_of(number=4, client="alice"), Facts(CHAT), 0.0)
    assert b"x-ratelimit-remaining-tokens: %d\r\n" % (600 - tokens) in made.limits, "no worker had it"


def test_a_client_is_told_what_is_left_of_its_rates() -> None:
    clients = Clients(
        alice=limited(requests_per_second=2.0, burst=3.0, tokens_per_minute=600.0), bob=limited(max_concurrent=1)
    )
    assert clients.tell("bob") == clients.tell("carol") == ""
    expected = (
        "x-ratelimit-limit-requests: 3\r\nx-ratelimit-remaining-requests: {}\r\nx-ratelimit-reset-requests: {}s\r\n"
        "x-ratelimit-limit-tokens: 600\r\nx-ratelimit-remaining-tokens: {}\r\nx-ratelimit-reset-tokens: {}s\r\n"
    )
    assert clients.tell() == expected.format(2, "0.500", 600, "0.000")
    number = clients.ask()
    assert clients.tell() == expected.format(0, "1.500", 600, "0.000")
    assert clients.tell() == expected.format(0, "1.500", 600, "0.000"), "this one is refused, and is told so too"
    clients.end(number, usage=Usage(700, 0, 100))
    assert clients.tell(now=0.5) == expected.format(1, "1.000", 0, "79.500")


# -- clients with tokens -----------------------------------------------------------------------------------------------


def test_each_subject_has_its_own_meter_and_the_named_ones_their_own_rules() -> None:
    quotas = Quotas()
    quotas.use_clients({}, limited(max_concurrent=1))
    switched = [quotas.on]
    quotas.use_clients({"jwt:vip": limited(max_concurrent=2)}, limited(max_concurrent=1))

    def ask(number: int, client: str) -> None:
        quotas.admit(tag_of(number=number, client=client), of_model(), 0.0)

    ask(1, "jwt:alice")
    ask(2, "jwt:bob")
    ask(3, "jwt:vip")
    ask(4, "jwt:vip")
    ask(5, "a key without limits")
    for client, words in (
        ("jwt:alice", "the subject alice"),
        ("jwt:bob", "the subject bob"),
        ("jwt:vip", "the subject vip"),
    ):
        with pytest.raises(ConcurrencyLimited, match=words):
            ask(6, client)
    quotas.use_clients({"jwt:alice": limited(max_concurrent=1)}, limited(max_concurrent=2))
    with pytest.raises(ConcurrencyLimited):  # what is in flight stays counted
        ask(6, "jwt:alice")
    ask(6, "jwt:bob")
    quotas.use_clients({})
    ask(7, "jwt:bob")
    assert [*switched, quotas.on] == [True, False]
    for number in range(1, 8):
        quotas.finished(finished(number=number))
    assert quotas.running == 0


def test_subjects_are_bounded_and_one_with_requests_in_flight_is_kept() -> None:
    quotas = Quotas(most=10)
    quotas.use_clients({}, limited(max_concurrent=1))
    for number in range(1000):
        quotas.admit(tag_of(number=number, client=f"jwt:{number}"), of_model(), 0.0)
        if number:
            quotas.finished(finished(number=number))
    assert len(quotas._subjects) <= 10
    with pytest.raises(ConcurrencyLimited):
        quotas.admit(tag_of(number=2000, client="jwt:0"), of_model(), 0.0)
    quotas.finished(finished(number=0))
    quotas.admit(tag_of(number=2000, client="jwt:0"), of_model(), 0.0)
    for number in range(3000, 3100):  # more in flight than there is room
        quotas.admit(tag_of(number=number, client=f"jwt:{number}"), of_model(), 0.0)
    assert len(quotas._subjects) <= 102
    for number in (2000, *range(3000, 3100)):
        quotas.finished(finished(number=number))
    assert quotas.running == 0


def test_both_rooms_call_clients_with_tokens_alike() -> None:
    assert quotas_module.TOKEN == keys.TOKEN


# -- several limits ----------------------------------------------------------------------------------------------------


def test_a_request_over_one_limit_is_counted_for_none() -> None:
    clients = Clients(alice=limited(requests_per_second=1.0, max_concurrent=1))
    clients.quotas.use_models({text_of("m"): ModelRules(LimitRules(max_concurrent=1))})
    first = clients.ask()
    clients.end(first)
    other = clients.ask("bob", now=1.0)
    with pytest.raises(ConcurrencyLimited, match='the model "m"'):
        clients.ask(now=1.0)
    clients.end(other, 1.0)
    clients.ask(now=1.0)
    assert clients.quotas.running == 1


def test_a_model_has_its_limits_under_all_its_names() -> None:
    quotas = Quotas()
    quotas.use_models({text_of("m"): ModelRules(LimitRules(max_concurrent=1))}, {text_of("alias"): text_of("m")})
    assert quotas.on
    quotas.admit(tag_of(number=1), of_model("alias"), 0.0)
    quotas.admit(tag_of(number=2), of_model("other"), 0.0)
    with pytest.raises(ConcurrencyLimited):
        quotas.admit(tag_of(number=3), of_model("m"), 0.0)


def test_a_key_may_be_for_some_models_only() -> None:
    clients = Clients(alice=ClientRules(models=frozenset({text_of("m")})))
    clients.ask(model="m")
    for model in ("n", ""):
        with pytest.raises(ModelNotAllowed) as refused:
            clients.ask(model=model)
        assert (refused.value.status, refused.value.code, refused.value.param) == (403, "model_not_allowed", "model")
    clients.ask("bob", model="n")
    about = Facts(ENDPOINTS[b"/v1/responses/{id}"])
    clients.quotas.admit(tag_of(number=99, client="alice"), about, 0.0)


def test_new_limits_count_at_once_and_what_is_in_flight_stays_counted() -> None:
    clients = Clients(alice=limited(max_concurrent=2, requests_per_second=1.0), bob=limited(max_concurrent=1))
    numbers = [clients.ask(), clients.ask("bob")]
    clients.quotas.use_clients({"alice": limited(max_concurrent=1, requests_per_second=1.0)})
    with pytest.raises(ConcurrencyLimited):
        clients.ask(now=5.0)
    clients.ask("bob", now=5.0)
    for number in numbers:
        clients.end(number, 5.0)
    clients.ask(now=5.0)
    with pytest.raises(ConcurrencyLimited):
        clients.ask(now=5.0)
    clients.quotas.use_clients({})
    assert not clients.quotas.on


def test_what_is_in_flight_stays_counted_while_a_key_is_gone() -> None:
    """A key that was taken away for a moment had all of its places free."""
    clients = Clients(alice=limited(max_concurrent=1))
    number = clients.ask()
    for rules in ({}, {"bob": limited(max_concurrent=1)}, {"alice": limited(max_concurrent=1)}):
        clients.quotas.use_clients(rules)
    with pytest.raises(ConcurrencyLimited):
        clients.ask()
    clients.end(number)
    clients.end(clients.ask())
    for name in map(str, range(50)):
        clients.quotas.use_clients({name: limited(max_concurrent=1)})
    assert not clients.quotas._former
    one = {text_of("m"): ModelRules(LimitRules(max_concurrent=1))}
    clients.quotas.use_models(one, {text_of("alias"): text_of("m")})
    number = clients.ask("bob")
    clients.quotas.use_models({})
    clients.quotas.use_models(one)
    with pytest.raises(ConcurrencyLimited):
        clients.ask("bob")
    clients.end(number)
    clients.end(clients.ask("bob"))
    assert clients.quotas.running == 0


def test_a_subject_that_gets_rules_of_its_own_and_loses_them_stays_counted() -> None:
    quotas, others = Quotas(), limited(max_concurrent=1)
    quotas.use_clients({}, others)
    quotas.admit(tag_of(number=1, client="jwt:alice"), of_model(), 0.0)
    for rules in ({"jwt:alice": others}, {}):
        quotas.use_clients(rules, others)
        with pytest.raises(ConcurrencyLimited):
            quotas.admit(tag_of(number=2, client="jwt:alice"), of_model(), 0.0)
    quotas.finished(finished(number=1))
    quotas.admit(tag_of(number=2, client="jwt:alice"), of_model(), 0.0)


def test_an_unchanged_rate_goes_on_over_a_reload() -> None:
    clients = Clients(alice=limited(requests_per_second=1.0))
    clients.ask()
    clients.quotas.use_clients({"alice": limited(requests_per_second=1.0)})
    with pytest.raises(RequestsLimited):
        clients.ask()
    clients.quotas.use_clients({"alice": limited(requests_per_second=2.0)})
    clients.ask()


steps = st.lists(
    st.tuples(st.sampled_from(["ask", "end", "reload"]), st.sampled_from(["a", "b", "c"]), st.integers(0, 50)),
    max_size=60,
)


@given(steps)
def test_whatever_happens_counters_return_to_zero_and_never_pass_the_limit(does: list[tuple[str, str, int]]) -> None:
    clients = Clients(a=limited(max_concurrent=2), b=limited(max_concurrent=3, requests_per_second=5.0))
    quotas = clients.quotas
    open_requests: list[int] = []
    for what, who, pick in does:
        if what == "ask":
            try:
                open_requests.append(clients.ask(who, now=float(pick)))
            except (ConcurrencyLimited, RequestsLimited):
                assert who != "c"
        elif what == "end" and open_requests:
            clients.end(open_requests.pop(pick % len(open_requests)))
        elif what == "reload":
            quotas.use_clients({"a": limited(max_concurrent=2), "b": limited(max_concurrent=pick % 3 + 1)})
        meters = {name: meter for name, (_, meter) in quotas._clients.items()}
        assert all(meter.running >= 0 for meter in meters.values())
        assert meters["a"].running <= 2
    for number in open_requests:
        clients.end(number)
    assert quotas.running == 0
    assert [meter.running for _, meter in quotas._clients.values()] == [0, 0]
    assert repr(quotas) == "<Quotas of 2 clients and 0 models, 0 in flight>"


# -- priorities --------------------------------------------------------------------------------------------------------


def asking(priority: int | None, client: str = "") -> RequestTag:
    made = tag_of(client=client)
    made.named = (b"", b"", b"", None, False, priority)
    return made


@pytest.mark.parametrize(
    ("client", "asked", "expected"),
    [
        ("", None, 0),
        ("", 10, 0),  # nobody gives himself a priority that the operator has not given him
        ("", -10, -10),
        ("batch", None, -10),
        ("batch", 5, 0),
        ("vip", None, 10),
        ("vip", 20, 10),
        ("vip", -3, -3),
        ("trusted", None, 0),
        ("trusted", 20, 15),
        ("low", 20, -5),
        ("plain", None, 0),
    ],
)
def test_how_high_a_priority_may_be(client: str, asked: int | None, expected: int) -> None:
    quotas = Quotas()
    quotas.use_clients(
        {
            "batch": ClientRules(priority=-10),
            "vip": ClientRules(priority=10),
            "trusted": ClientRules(max_priority=15),
            "low": ClientRules(priority=-10, max_priority=-5),
            "plain": ClientRules(),
        }
    )
    assert quotas.priority(asking(asked, client), of_model()) == expected


def test_the_model_gives_a_priority_and_the_operator_a_higher_bound() -> None:
    quotas = Quotas(5)
    quotas.use_models({text_of("m"): ModelRules(priority=7)})
    assert [quotas.priority(asking(each), of_model("m")) for each in (None, 20, 1)] == [7, 7, 1]
    assert [quotas.priority(asking(each), of_model("n")) for each in (None, 20, 1)] == [0, 5, 1]
    quotas.use_clients({"batch": ClientRules(priority=-10)})
    assert quotas.priority(asking(None, "batch"), of_model("m")) == -10
    quotas.use_clients({"low": ClientRules(max_priority=-5)})
    assert quotas.priority(asking(None, "low"), of_model("m")) == -5, "a key's bound holds for the model's priority too"


def test_headers_and_files_read_the_same_priorities() -> None:
    assert (request_id.PRIORITIES, request_id.MOST_PRIORITY) == (key_files.PRIORITIES, key_files.MOST_PRIORITY)


# -- in the router -----------------------------------------------------------------------------------------------------


def test_the_router_asks_for_the_limits_first() -> None:
    bench = Bench(1, "round_robin")
    bench.router.quotas.use_models({text_of("m"): ModelRules(LimitRules(max_concurrent=1))})
    first = bench.ask(of_model())
    with pytest.raises(ConcurrencyLimited):
        bench.ask(of_model())
    bench.ask(of_model("n")).attempt.end(Outcome.SERVED)
    first.attempt.end(Outcome.SERVED)
    assert bench.router.leases == 0


def test_one_that_waited_too_long_is_told_when_its_like_begin() -> None:
    bench = Bench(1, "round_robin", queue=QueueRules(max_concurrent=1))
    bench.ask(facts(b"x"))
    normal, *_ = (bench.ask(facts(b"x"), priority=priority) for priority in (None, -10, -10))
    error = bench.router.expired(normal.tag, 2.0)
    assert error.code == "queue_timeout"
    assert error.retry_after == pytest.approx(2.0), "nobody is before it"


def test_priorities_order_the_routers_queue_and_a_full_one_answers_the_lowest() -> None:
    bench = Bench(1, "round_robin", queue=QueueRules(max_concurrent=1, queue_size=3))
    running = bench.ask(facts(b"x"))
    low, newest, normal = (bench.ask(facts(b"x"), priority=priority) for priority in (-10, -10, None))
    high = bench.ask(facts(b"x"), priority=10)
    assert isinstance(newest.answers[-1], QueueFull), "nobody may ask for more than 0 here: the queue is in order"
    with pytest.raises(QueueFull):
        bench.ask(facts(b"x"), priority=-10)
    for following in (normal, high, low):
        assert following.waits is not None
        running.attempt.end(Outcome.SERVED)
        bench.settle()
        running = following
    running.attempt.end(Outcome.SERVED)
    assert (bench.router.queue.running, len(bench.router.queue), bench.router.leases) == (0, 0, 0)
    bench.router.quotas.max_priority = 20
    running = bench.ask(facts(b"x"))
    normal, high = bench.ask(facts(b"x")), bench.ask(facts(b"x"), priority=10)
    running.attempt.end(Outcome.SERVED)
    bench.settle()
    assert normal.waits is not None
    high.attempt.end(Outcome.SERVED)
    bench.settle()
    normal.attempt.end(Outcome.SERVED)
