"""The loads of scripts/routing-suite: all can be replayed or played, and the policies are those of this version."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.routing_suite import rows
from scripts.routing_suite.replays import policies, takes
from scripts.routing_suite.rows import LIVED, REPLAYED, Lived, Replayed, replayed
from scripts.routing_suite.scripted import script

from sglang_router.replay.options import parse_options
from sglang_router.replay.sources import load_of


@pytest.mark.parametrize("load", REPLAYED, ids=[load.name for load in REPLAYED])
def test_every_load_can_be_replayed(load: Replayed) -> None:
    options = parse_options([load.trace, *load.flags, "--policies", ",".join(policies())])
    if load.trace.startswith(rows.GENERATOR):
        assert next(load_of(options, 1).arrivals()).prompt > 0


@pytest.mark.parametrize("load", LIVED, ids=[load.name for load in LIVED])
def test_every_load_can_be_played(load: Lived) -> None:
    chains = script(f"{load.trace},requests=20", 1)
    assert sum(len(chain.turns) for chain in chains) == 20
    assert all(bool(chain.session) == load.sessions for chain in chains)
    assert load.restart < 20, "the restart is within the run"


def test_policies_of_this_version_are_compared() -> None:
    assert {"cache_aware", "least_load", "power_of_two", "round_robin", "longest_prefix"} <= set(policies())


def test_loads_of_traces_need_the_traces(tmp_path: Path) -> None:
    generated = [load.name for load in replayed(None, "")]
    assert [load.name for load in replayed(tmp_path, "")] == generated
    (tmp_path / rows.AZURE).touch()
    (further,) = [load for load in replayed(tmp_path, "") if load.name not in generated]
    assert further.trace == str(tmp_path / rows.AZURE)


def test_what_differs_for_sessions_only_is_replayed_with_those_only() -> None:
    with_sessions = {load.name for load in REPLAYED if takes(load, "cost:session-affinity")}
    assert with_sessions == {load.name for load in REPLAYED if load.name.startswith(("agents", "sessions"))}
    assert all(takes(load, "cost") for load in REPLAYED)


def test_a_load_says_what_it_is() -> None:
    load = Lived("a", "groups,rate=1", cache=48_000, speeds=(1.0, 0.4), restart=15.0)
    assert load.about == (
        "`gen:groups,rate=1`, 2 engines with 48,000 slots, speeds 1, 0.4; the second one is killed after 15 s and back"
        " 8 s later"
    )
    assert "killed" not in load._replace(restart=0.0).about
