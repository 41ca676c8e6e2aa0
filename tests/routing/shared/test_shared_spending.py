"""Limits of clients and models count the requests of all routers together."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fleets import ROUTE, facts
from joined import KEY, LARGE, Joined
from sglang_router.errors import ConcurrencyLimited, Overload, RequestsLimited, TokensLimited
from sglang_router.routing.events import Answered, Finished
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.quotas import Quotas
from sglang_router.routing.rules import ClientRules, LimitRules, ModelRules
from sglang_router.routing.shared.packing import packed
from sglang_router.routing.shared.records import FORM, LoadsMessage, SharedTopic
from sglang_router.routing.shared.secret import Secret
from sglang_router.routing.usage import Usage


def routers(count: int = 2, **limits: Any) -> Joined:
    joined = Joined(count, 1)
    for bench in joined.benches:
        bench.router.quotas.use_clients({"alice": ClientRules(LimitRules(**limits)), "bob": ClientRules()})
    return joined


def quotas(joined: Joined, number: int) -> Quotas:
    return joined.benches[number].router.quotas


def begin(
    joined: Joined, router: int, number: int, now: float, client: str = "alice", model: bytes = b""
) -> RequestTag:
    tag = RequestTag(number, b"r", now, ROUTE)
    tag.client = client
    quotas(joined, router).admit(tag, facts(model=model), now)
    return tag


def end(joined: Joined, router: int, tag: RequestTag, tokens: int = 0) -> None:
    quotas(joined, router).finished(Finished(tag, None, Answered(200, usage=Usage(tokens, 0, 0))))


def test_requests_in_flight_are_counted_together() -> None:
    joined = routers(max_concurrent=2)
    first = begin(joined, 0, 1, 0.0)
    begin(joined, 1, 1, 0.0)
    joined.flush(0.1)
    with pytest.raises(ConcurrencyLimited, match="There are 2 requests in flight of the key alice"):
        begin(joined, 1, 2, 0.2)
    begin(joined, 1, 3, 0.2, "bob")
    end(joined, 0, first)
    joined.flush(0.3)
    begin(joined, 1, 4, 0.4)


def test_a_rate_is_one_for_all_routers() -> None:
    joined = routers(requests_per_second=1.0, burst=2)
    begin(joined, 0, 1, 0.0)
    begin(joined, 0, 2, 0.0)
    joined.flush(0.1)
    with pytest.raises(RequestsLimited):
        begin(joined, 1, 1, 0.2)
    begin(joined, 1, 2, 1.2)
    joined.flush(1.3)
    with pytest.raises(RequestsLimited):
        begin(joined, 0, 3, 1.4)


def test_tokens_are_charged_at_all_routers_once() -> None:
    joined = routers(tokens_per_minute=600.0)
    end(joined, 0, begin(joined, 0, 1, 0.0), 900)
    joined.flush(0.1)
    joined.flush(0.2)
    for router in range(2):
        with pytest.raises(TokensLimited):
            begin(joined, router, 2, 1.0)
        begin(joined, router, 3, 31.0)


LIMITS = pytest.mark.parametrize("limits", [{"requests_per_second": 0.1, "burst": 4}, {"tokens_per_minute": 240.0}])


def use_up(joined: Joined, router: int) -> None:
    """Use all that may be used at once, and of tokens a quarter more, at the time 0: one is there after 10 or 15 s."""
    for number in range(4):
        end(joined, router, begin(joined, router, number, 0.0), 75)


@LIMITS
def test_a_new_router_learns_how_much_of_a_limit_is_used_up(limits: dict[str, Any]) -> None:
    joined = routers(**limits)
    use_up(joined, 0)
    joined.flush(0.1)
    new, _ = joined.add(1)
    new.router.quotas.use_clients({"alice": ClientRules(LimitRules(**limits))})
    del joined.states[0], joined.benches[0]  # it has served them, and is replaced
    joined.flush(4.1)
    for router in range(2):
        with pytest.raises(Overload, match="key alice"):
            begin(joined, router, 5, 5.0)
        begin(joined, router, 6, 16.0)


@LIMITS
def test_what_was_not_heard_in_a_gap_is_learnt_after_it(limits: dict[str, Any]) -> None:
    joined = routers(**limits)
    joined.flush(-10.0)
    joined.lost = True
    use_up(joined, 0)
    joined.tell(0.1)
    for state in joined.states:
        state.look(4.0)
    joined.lost = False
    joined.flush(4.1)
    with pytest.raises(Overload, match="key alice"):
        begin(joined, 1, 5, 5.0)
    begin(joined, 1, 6, 16.0)


@LIMITS
def test_what_is_used_up_comes_back_although_each_says_it_late_to_the_others(limits: dict[str, Any]) -> None:
    joined = routers(4, **limits)
    use_up(joined, 0)
    for turn in range(1, 80):
        joined.tell(turn * 1.1 - 0.9)
        for state in joined.states:
            assert not state.apply(turn * 1.1, LARGE)
            state.look(turn * 1.1)
    for router in range(4):
        assert all(not each.debts(80.0) for each in quotas(joined, router).meters())


def test_models_have_limits_of_their_own() -> None:
    joined = Joined(2, 1)
    for bench in joined.benches:
        bench.router.quotas.use_models({b'"m"': ModelRules(LimitRules(max_concurrent=1))}, {b'"alias"': b'"m"'})
    begin(joined, 0, 1, 0.0, model=b'"m"')
    joined.flush(0.1)
    with pytest.raises(ConcurrencyLimited):
        begin(joined, 1, 1, 0.2, model=b'"alias"')


def test_a_router_that_is_gone_holds_nobody_up() -> None:
    joined = routers(max_concurrent=1)
    begin(joined, 0, 1, 0.0)
    joined.flush(0.1)
    joined.states[1].look(3.2)
    begin(joined, 1, 1, 3.2)


def test_a_lost_message_is_mended_and_a_change_of_limits_is_followed() -> None:
    joined = routers(max_concurrent=1)
    tag = begin(joined, 0, 1, 0.0)
    joined.flush(0.1)
    joined.lost = True
    end(joined, 0, tag)
    joined.flush(0.2)
    joined.lost = False
    with pytest.raises(ConcurrencyLimited):
        begin(joined, 1, 1, 0.3)
    joined.flush(1.2)
    tag = begin(joined, 1, 2, 1.3)
    quotas(joined, 0).use_clients({"carol": ClientRules()})
    quotas(joined, 0).use_clients({"alice": ClientRules(LimitRules(max_concurrent=1))})
    joined.flush(1.4)
    with pytest.raises(ConcurrencyLimited):
        begin(joined, 0, 2, 1.5)
    end(joined, 1, tag)
    joined.flush(1.6)
    begin(joined, 0, 3, 1.7)


def test_many_clients_are_told_in_several_messages() -> None:
    joined = Joined(2, 1)
    names = [f"client {number}" for number in range(2500)]
    for bench in joined.benches:
        bench.router.quotas.use_clients({name: ClientRules(LimitRules(max_concurrent=1)) for name in names})
    for number, name in enumerate(names):
        begin(joined, 0, number, 0.0, name)
    joined.flush(0.0)
    assert max(len(payload) for _, _, payload in joined.sent) <= 1 << 16
    for number, name in enumerate(names):
        with pytest.raises(ConcurrencyLimited):
            begin(joined, 1, number, 0.1, name)


def test_clients_with_tokens_count_together_as_soon_as_a_router_hears_of_them() -> None:
    joined = Joined(2, 1)
    for bench in joined.benches:
        bench.router.quotas.use_clients({}, ClientRules(LimitRules(max_concurrent=1)))
    tag = begin(joined, 0, 1, 0.0, "jwt:alice")
    joined.flush(0.1)
    with pytest.raises(ConcurrencyLimited, match="the subject alice"):
        begin(joined, 1, 1, 0.2, "jwt:alice")
    begin(joined, 1, 2, 0.2, "jwt:bob")
    end(joined, 0, tag)
    joined.flush(0.3)
    begin(joined, 1, 3, 0.4, "jwt:alice")


def test_what_is_known_of_clients_that_come_and_go_is_bounded() -> None:
    joined = Joined(0, 1)
    bench, state = joined.add(1, quotas=Quotas(most=16))
    bench.router.quotas.use_clients({}, ClientRules(LimitRules(max_concurrent=1)))
    for number in range(500):
        end(joined, 0, begin(joined, 0, number, 0.0, f"jwt:{number}"))
        joined.flush(float(number))
    assert repr(state._spending) in [f"<SharedSpending of {count} clients and models>" for count in range(20)]
    assert len(list(bench.router.quotas.meters())) <= 17


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("limits", [{"requests_per_second": 1.0}, {"tokens_per_minute": 60.0}])
def test_a_router_that_tells_of_endless_use_locks_a_client_out_for_an_hour_at_most(
    limits: dict[str, Any], used: bool
) -> None:
    joined = routers(1, **limits)
    secret, state = Secret(KEY, 512), joined.states[0]
    code, spent = secret.name(b"meter", b"the key alice"), [((1 << 32) - 1) << 32, (1 << 64) - 1] if used else [0, 0]
    debts = b"" if used else packed([(1 << 64) - 1])
    message = LoadsMessage(FORM, b"sick one", 1, meters=packed([code]), spent=packed(spent), debts=debts)
    state.receive(SharedTopic.LOADS, secret.seal("loads", msgspec.msgpack.encode(message)))
    assert not state.apply(0.0, LARGE)
    with pytest.raises(Overload, match="key alice"):
        begin(joined, 0, 1, 3500.0)
    begin(joined, 0, 2, 3700.0)


def test_the_end_of_requests_of_very_many_clients_is_learnt_although_its_message_was_lost() -> None:
    joined = routers(2, max_concurrent=1)
    names = [f"c{number}" for number in range(2500)]
    for bench in joined.benches:
        bench.router.quotas.use_clients({name: ClientRules(LimitRules(max_concurrent=1)) for name in names})
    tags: list[RequestTag] = []
    for number, name in enumerate(names):
        tags.append(begin(joined, 0, number, 0.0, name))
    joined.flush(0.0)
    (peer,) = joined.states[1].peers.by_name.values()
    assert len(peer.meters) == 2500
    joined.lost = True
    for tag in tags[:200]:
        end(joined, 0, tag)
    joined.flush(0.5)
    joined.lost = False
    joined.flush(2.0)
    assert len(peer.meters) == 2300
    begin(joined, 1, 1, 2.1, names[0])
