"""manual: homes of routing keys, how new ones are given, and when they are forgotten."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fleets import Bench, spec
from sglang_router.config import OPTIONS
from sglang_router.routing.policies.manual import _OVERHEAD, Manual


def manual(count: int, mode: str = "min_group", **rules: Any) -> Bench:
    return Bench(count, "manual", assignment_mode=mode, **rules)


def test_a_key_stays_where_it_is() -> None:
    b = manual(5, "random")
    plans = [b.serve(key=b"me") for _ in range(20)]
    assert len({plan.worker for plan in plans}) == 1
    assert [plan.branch for plan in plans] == ["vacant"] + ["occupied_hit"] * 19


def test_a_key_returns_home_after_an_outage() -> None:
    b = manual(3)
    home = b.serve(key=b"me").worker
    b.fleet.set_draining(home, True)
    during = [b.serve(key=b"me") for _ in range(3)]
    assert [plan.branch for plan in during] == ["occupied_miss", "occupied_hit", "occupied_hit"]
    assert len({plan.worker for plan in during}) == 1
    assert during[0].worker is not home
    b.fleet.set_draining(home, False)
    back = b.serve(key=b"me")
    assert (back.worker, back.branch) == (home, "occupied_hit")


def test_a_key_remembers_two_homes() -> None:
    b = manual(4)
    seen = []
    for _ in range(3):
        seen.append(b.serve(key=b"me").worker)
        b.fleet.set_draining(seen[-1], True)
    assert len(set(seen)) == 3
    b.fleet.set_draining(seen[0], False)
    assert b.serve(key=b"me").branch == "occupied_miss", "the first of three is forgotten"
    b.fleet.set_draining(seen[2], False)
    assert b.serve(key=b"me").worker is seen[2]


def test_new_keys_are_assigned_by_the_mode() -> None:
    b = manual(3, "min_load")
    b.load(1, 0, 1)
    assert b.number(b.choose(key=b"a").worker) == 1
    assert b.choose().branch == "no_key"
    b = manual(3, "min_group")
    b.load(0, 5, 9)
    assert sorted(b.number(b.choose(key=b"%d" % n).worker) for n in range(6)) == [0, 0, 1, 1, 2, 2]
    b = manual(3, "random")
    counts = Counter(b.number(b.choose(key=b"%d" % n).worker) for n in range(600))
    assert all(150 < counts[n] < 250 for n in range(3))


def test_fewest_keys_counts_those_that_moved_where_they_are_now() -> None:
    b = manual(2)
    keys = [b"a", b"b", b"c", b"d"]

    def serve(keys: list[bytes]) -> list[int]:
        return b.spread([b.serve(key=key) for key in keys])

    assert serve(keys) == [2, 2]
    b.fleet.set_draining(b.workers[0], True)
    assert serve(keys) == [0, 4]
    b.fleet.set_draining(b.workers[0], False)
    assert serve([b"e", b"f", b"g", b"h"]) == [4, 0], "it held none then"
    assert serve(keys) == [2, 2], "home again: it holds six now, the other two"
    assert serve([b"i", b"j", b"k", b"l"]) == [0, 4]


def test_fewest_keys_does_not_count_those_of_a_removed_worker() -> None:
    b = manual(2)
    for n in range(10):
        b.serve(key=b"%d" % n)
    b.fleet.remove(b.workers[0])
    for n in range(10):
        b.serve(key=b"%d" % n)
    b.workers.append(b.fleet.add(spec("w0"), 1.0))
    assert {b.serve(key=b"new %d" % n).worker for n in range(10)} == {b.workers[2]}


def test_keys_that_rest_are_forgotten_a_few_at_a_time() -> None:
    b = manual(2, max_idle=100.0)
    for n in range(6):
        b.serve(key=b"%d" % n, now=float(n))
    b.serve(key=b"0", now=50.0)
    assert b.policy.tidy(100.9, 8) is False
    assert b.serve(key=b"1", now=100.9).branch == "occupied_hit"
    assert b.policy.tidy(104.5, 2) is True
    assert b.policy.tidy(104.5, 2) is False
    branches = [b.serve(key=b"%d" % n, now=104.5).branch for n in range(6)]
    assert branches == ["occupied_hit", "occupied_hit", "vacant", "vacant", "vacant", "occupied_hit"]


def test_a_key_rests_since_its_last_use() -> None:
    b = manual(2, max_idle=100.0)
    b.serve(key=b"me", now=0.0)
    b.serve(key=b"me", now=50.0)
    b.policy.tidy(149.9, 9)
    assert b.choose(key=b"me").branch == "occupied_hit"  # at 0.0, so that it is older again
    b.policy.tidy(100.0, 9)
    assert b.choose(key=b"me").branch == "vacant"


def test_forgotten_keys_do_not_count() -> None:
    b = manual(2, max_idle=10.0)
    b.fleet.set_draining(b.workers[0], True)
    for n in range(5):
        b.serve(key=b"old %d" % n)
    b.fleet.set_draining(b.workers[0], False)
    b.policy.tidy(50.0, 99)
    assert b.spread([b.serve(key=b"new %d" % n, now=50.0) for n in range(4)]) == [2, 2]


def test_assignment_modes_are_those_of_the_option() -> None:
    for mode in OPTIONS["assignment_mode"].choices:
        manual(1, mode).serve(key=b"k")


def test_f7_a_routing_key_of_60_kb_is_kept_as_a_digest() -> None:
    """60 kB a key were kept for up to four hours: a million of them would be 60 GB."""
    b = manual(3)
    long = [b"%d" % n + b"x" * 60_000 for n in range(50)]
    homes = [b.serve(key=key).worker for key in long]
    assert [b.serve(key=key).worker for key in long] == homes
    assert isinstance(b.policy, Manual)
    assert max(len(key) for key in b.policy._homes) <= 64


def test_f7_the_keys_are_bounded_in_bytes() -> None:
    b = manual(2)
    assert isinstance(b.policy, Manual)
    b.policy.most_bytes = 100_000
    for number in range(1000):
        b.serve(key=b"%064d" % number)
    held = sum(_OVERHEAD + len(key) for key in b.policy._homes)
    assert 99_000 < held <= 100_000
    assert f"keys of {held} bytes" in repr(b.policy)
    assert b.serve(key=b"%064d" % 999).branch == "occupied_hit"
    assert b.serve(key=b"%064d" % 0).branch == "vacant"
    assert sum(b.policy._keys.values()) == len(b.policy._homes)
