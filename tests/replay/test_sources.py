"""Files that can be replayed are recognised and read in a stream; a mistake is told with its line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sglang_router.errors import ConfigError
from sglang_router.replay.agents import AgentSessions
from sglang_router.replay.generator import SHAPES
from sglang_router.replay.load import UNIT, Load, LoadRequest
from sglang_router.replay.options import parse_options
from sglang_router.replay.recorded import RecordedDecisions
from sglang_router.replay.sources import load_of
from sglang_router.replay.traces import Azure, Mooncake


def written(folder: Path, *lines: Any) -> Path:
    """Write a file of lines; what is no string is written as JSON."""
    path = folder / "trace"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def opened(trace: object, *flags: str, seed: int = 1) -> Load:
    return load_of(parse_options([str(trace), *flags]), seed)


def common(one: LoadRequest, other: LoadRequest, page: int) -> int:
    """Return how many whole pages two prompts have in common."""
    pages = [[ask.pages[at : at + UNIT] for at in range(0, ask.prompt // page * UNIT, UNIT)] for ask in (one, other)]
    same = [a == b for a, b in zip(*pages, strict=False)]
    return same.index(False) if False in same else len(same)


def whole(load: Load) -> None:
    """Check that the units reach to the end of each answer."""
    for ask in load.arrivals():
        assert len(ask.pages) % UNIT == 0
        assert len(ask.pages) // UNIT >= (ask.prompt + ask.output) // load.page


# -- Mooncake ---------------------------------------------------------------------------------------------------------

MOONCAKE = (
    {"timestamp": 3000, "input_length": 1100, "output_length": 6, "hash_ids": [0, 1, 2]},
    {"timestamp": 3500, "input_length": 1024, "output_length": 0, "hash_ids": [0, 7]},
    {"timestamp": 5000, "input_length": 1200, "output_length": 90, "hash_ids": [0, 1, 9]},
)


def test_mooncake(tmp_path: Path) -> None:
    load = opened(written(tmp_path, *MOONCAKE))
    assert isinstance(load, Mooncake)
    one, two, three = load.arrivals()
    assert [(ask.at, ask.prompt, ask.output) for ask in (one, two, three)] == [
        (0.0, 1100, 6),
        (0.5, 1024, 1),
        (2.0, 1200, 90),
    ]
    assert common(one, two, load.page) == 512 // load.page
    assert common(one, three, load.page) == 1024 // load.page
    whole(load)


def test_mooncake_faster(tmp_path: Path) -> None:
    load = opened(written(tmp_path, *MOONCAKE), "--speedup", "2", "--requests", "2")
    assert [ask.at for ask in load.arrivals()] == [0.0, 0.25]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"timestamp": "x"}, "timestamp must be a number"),
        ({"timestamp": True}, "timestamp must be a number"),
        ({"timestamp": float("nan")}, "timestamp must be a number"),
        ({"input_length": -1}, "input_length must be a whole number"),
        ({"input_length": 1.5}, "input_length must be a whole number"),
        ({"output_length": None}, "output_length must be a whole number"),
        ({"hash_ids": 5}, "hash_ids must be a list"),
        ({"hash_ids": ["a"]}, "hash_ids must be a list"),
        ({"hash_ids": [True]}, "hash_ids must be a list"),
        ({"output_length": 10**12}, "output_length must be at most"),
        ({"input_length": 2000}, "3 hash_ids are too few for 2000 tokens"),
    ],
)
def test_mooncake_with_a_mistake(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    load = opened(written(tmp_path, MOONCAKE[0], MOONCAKE[0] | change))
    with pytest.raises(ConfigError, match=f"trace, line 2: {what}"):
        list(load.arrivals())


# -- Azure ------------------------------------------------------------------------------------------------------------

AZURE = ("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 23:59:59.5000000,374,44", "2023-11-17 00:00:01,3,0")


def test_azure(tmp_path: Path) -> None:
    load = opened(written(tmp_path, *AZURE))
    assert isinstance(load, Azure)
    one, two = load.arrivals()
    assert [(ask.at, ask.prompt, ask.output) for ask in (one, two)] == [(0.0, 374, 44), (1.5, 3, 1)]
    assert common(one, two, load.page) == 0
    assert one.text(load.page, 1000) != two.text(load.page, 1000)
    assert two.text(load.page, 1000)  # a text even of a prompt that is shorter than a page
    whole(load)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("2023-11-16 23:59:59,374", "2 fields and not three"),
        ("yesterday,374,44", "TIMESTAMP is not a time"),
        ("2023-11-16 23:59:59.x,374,44", "TIMESTAMP is not a time"),
        ("2023-11-16 23:59:59+01:00,374,44", "TIMESTAMP is not a time"),
        ("2023-11-16 23:59:59,many,44", "must be whole numbers"),
        ("2023-11-16 23:59:59,1,-4", "must be whole numbers"),
        ("2023-11-16 23:59:59,1000000000000,4", "ContextTokens must be at most"),
        (f"2023-11-16 23:59:59,1,{'9' * 5000}", "GeneratedTokens must be at most"),
    ],
)
def test_azure_with_a_mistake(tmp_path: Path, line: str, what: str) -> None:
    load = opened(written(tmp_path, *AZURE, "", line))
    with pytest.raises(ConfigError, match=f"trace, line 5: .*{what}"):
        list(load.arrivals())


# -- agent sessions ---------------------------------------------------------------------------------------------------

SESSIONS = (
    {"b": 64, "r": [[0.0, 640, 10, 1.0, 0.0, 0, 1, 10], {"sub": []}, [9.0, 900, 20, 1.0, 400.0, 10, 50, 3, 60, 2]]},
    {"b": 64, "r": [[0.0, 320, 10, 1.0, 0.0, 0, 1, 5], [9.0, 320, 0, 1.0, None, 5]]},
    {"b": 64, "r": [[0.0, 64, 10, 1.0, 0.0, 0, 1, 1]]},
    {"b": 64, "r": []},
)


def test_agent_sessions(tmp_path: Path) -> None:
    load = opened(written(tmp_path, *SESSIONS), "--live", "2", "--think-cap", "100")
    assert isinstance(load, AgentSessions)
    one, two = load.arrivals()
    assert {one.session, two.session} == {b"session1", b"session2"}
    one, two = (one, two) if one.session == b"session1" else (two, one)
    assert (one.prompt, two.prompt) == (640, 320)
    assert common(one, two, 64) == 0  # the same numbers in two sessions are different blocks
    further = load.answered(one, 50.0)
    assert further is not None
    assert (further.at, further.prompt, further.output) == (150.0, 900, 20)
    assert common(one, further, 64) == 10
    again = load.answered(two, 60.0)
    assert again is not None
    assert (again.at, again.output) == (60.0, 1)
    assert common(two, again, 64) == 5
    third = load.answered(further, 200.0)  # the session is over: the next one begins
    assert third is not None
    assert (third.at, third.session) == (200.0, b"session3")
    assert load.answered(again, 210.0) is None


def test_agent_sessions_begin_at_other_times_with_another_seed(tmp_path: Path) -> None:
    path = written(tmp_path, *SESSIONS)
    one, same, other = ([ask.at for ask in opened(path, seed=seed).arrivals()] for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"b": 32, "r": []}, "b is 32 and not 64"),
        ({"b": 64, "r": 5}, "r must be a list"),
        ({"b": 64, "r": [[0.0, 64]]}, "must have six numbers"),
        ({"b": 64, "r": [[0.0, 64, 1, 1.0, 0.0, 0, 1]]}, "must have six numbers"),
        ({"b": 64, "r": [[0.0, 65, 1, 1.0, 0.0, 0, 1, "x"]]}, "len must be a whole number"),
        ({"b": 64, "r": [[0.0, 65, 1, 1.0, 0.0, 0, 1, 10**10]]}, "len must be at most"),
        ({"b": 64, "r": [[0.0, 65, 1, 1.0, 0.0, 0, 10**11, 1]]}, "start must be at most"),
        ({"b": 64, "r": [[0.0, 128, 1, 1.0, 0.0, 0, 1, 1]]}, "1 blocks are too few for 128 tokens"),
    ],
)
def test_agent_sessions_with_a_mistake(tmp_path: Path, line: dict[str, Any], what: str) -> None:
    load = opened(written(tmp_path, SESSIONS[2], line))
    with pytest.raises(ConfigError, match=f"trace, line 2: .*{what}"):
        list(load.arrivals())


def test_a_mistake_in_a_later_request_is_told_with_the_line_of_its_session(tmp_path: Path) -> None:
    wrong = {"b": 64, "r": [[0.0, 64, 1, 1.0, 0.0, 0, 1, 1], [0.0, 64, 1, 1.0, "x", 0, 1, 1]]}
    load = opened(written(tmp_path, wrong, *SESSIONS[2:] * 3))
    first, *_ = load.arrivals()
    with pytest.raises(ConfigError, match="trace, line 1: think_time"):
        load.answered(first, 1.0)


# -- decision logs ----------------------------------------------------------------------------------------------------

HEADER = {"format": "sglang-router-decisions", "version": 1, "block": 256}


def test_a_decision_log(tmp_path: Path) -> None:
    """Three bytes are a token here; the lines are in the order of the ends of their requests."""
    load = opened(
        written(
            tmp_path,
            HEADER,
            {"t": 105.0, "bytes": 600, "chain": ["a", "b"], "prompt_tokens": 200, "completion_tokens": 5},
            {"t": 101.0, "bytes": 900, "chain": ["a", "b", "c"], "prompt_tokens": 300, "session": "s"},
            {"missing": 3},
            {"t": 106.0, "bytes": 256, "chain": ["z"], "session": None, "completion_tokens": None, "stream": False},
            {"t": 107.0, "bytes": 100},
        )
    )
    assert isinstance(load, RecordedDecisions)
    assert load.page == 85
    asks = list(load.arrivals())
    assert [(ask.at, ask.prompt, ask.output, ask.session) for ask in asks] == [
        (0.0, 299, 128, b"s"),
        (4.0, 199, 5, b""),
        (5.0, 85, 128, b""),
        (6.0, 33, 128, b""),
    ]
    assert [ask.stream for ask in asks] == [True, True, False, True]
    assert common(asks[0], asks[1], load.page) == 2
    assert common(asks[0], asks[2], load.page) == 0
    whole(load)


def test_a_decision_log_without_tokens(tmp_path: Path) -> None:
    load = opened(written(tmp_path, HEADER, {"t": 1.0, "bytes": 512, "chain": ["a", "b"]}))
    (ask,) = load.arrivals()
    assert (load.page, ask.prompt) == (64, 128)


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([HEADER | {"version": 9}], "line 1: a decision log of version 9"),
        ([HEADER | {"block": 0}], "line 1: block must not be 0"),
        ([HEADER | {"block": 10**30}], "line 1: block must be at most"),
        ([HEADER, "oops"], "line 2: not JSON"),
        ([HEADER, '{"t":' + "[" * 20_000], "line 2: nested too deeply"),
        ([HEADER, {"t": 1.0, "bytes": 10**15}], "line 2: bytes must be at most"),
        ([HEADER, {"t": 1.0, "bytes": 5, "prompt_tokens": 10**11}], "line 2: prompt_tokens must be at most"),
        ([HEADER, [1]], "line 2: not a JSON object"),
        ([HEADER, {"t": 1.0, "bytes": 5}, {"t": None, "bytes": 5}], "line 3: t must be a number"),
        ([HEADER, {"t": 1.0, "bytes": 5, "chain": "abc"}], "line 2: chain must be a list"),
    ],
)
def test_a_decision_log_with_a_mistake(tmp_path: Path, lines: list[Any], what: str) -> None:
    with pytest.raises(ConfigError, match=f"trace, {what}"):
        list(opened(written(tmp_path, *lines)).arrivals())


def test_a_decision_log_with_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    record = {"t": 1.0, "bytes": 300, "session": "\ud800", "chain": ["\ud800"]}
    one, other = opened(written(tmp_path, HEADER, record, record)).arrivals()
    assert one.session == other.session != b""
    assert common(one, other, 64) == 1


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.write_bytes(gzip.compress("\n".join(AZURE).encode()))
    assert len(list(opened(path).arrivals())) == 2


def test_a_compressed_file_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.write_bytes(gzip.compress("\n".join(AZURE).encode())[:-12])
    with pytest.raises(ConfigError, match="packed: cannot be read"):
        list(opened(path).arrivals())


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([], "the file is empty"),
        (["[" * 20_000], "line 1: not a trace that can be replayed"),
        ([{"b": True, "r": []}], "line 1: b must be a whole number"),
        ([{"b": 0, "r": []}], "line 1: b must not be 0"),
        (["hello"], "line 1: not a trace that can be replayed"),
        ([{"model": "x"}], "line 1: not a trace that can be replayed"),
        ([{"format": "another"}], "line 1: not a trace that can be replayed"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, lines: list[Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        opened(written(tmp_path, *lines))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\xff\xfe\x00\x00")
    with pytest.raises(ConfigError, match="trace, after line 0: not text in UTF-8"):
        opened(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        opened(tmp_path / "missing")


def test_a_pipe_can_be_read_only_once_and_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="must be a file and not a pipe"):
        opened(tmp_path / "pipe")


# -- generators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_generator_gives_as_many_requests_as_are_wanted(name: str) -> None:
    load = opened(f"gen:{name},requests=200,every=1")
    found, last = [], 0.0
    for ask in load.arrivals():
        assert ask.at >= last
        last = ask.at
        found.append(ask)
        following = load.answered(ask, last)
        while following is not None:
            found.append(following)
            following = load.answered(following, following.at)
    assert len(found) == 200
    assert len({ask.number for ask in found}) == 200
    for ask in found:
        assert len(ask.pages) // UNIT == (ask.prompt + ask.output) // load.page


def test_groups_share_a_prefix() -> None:
    load = opened("gen:groups,groups=2,prefix=160,requests=50")
    first, *others = load.arrivals()
    assert {common(first, ask, load.page) for ask in others} == {0, 10}


def test_one_prefix_is_hot() -> None:
    load = opened("gen:hot-prefix,groups=50,prefix=160,requests=1000,share=0.5")
    heads = [ask.pages[: 10 * UNIT] for ask in load.arrivals()]
    assert 450 < max(heads.count(head) for head in set(heads)) < 570


def test_strangers_are_long_and_alone() -> None:
    load = opened("gen:strangers,requests=1000,stranger=16000,share=0.1")
    strangers = [ask for ask in load.arrivals() if ask.prompt > 4000]
    assert 70 < len(strangers) < 140
    assert len({ask.pages[:UNIT] for ask in strangers}) == len(strangers)


def test_a_crowd_comes_at_once_with_a_new_prefix() -> None:
    load = opened("gen:bursts,rate=1,burst=40,every=10,within=0.5,requests=200,prefix=160")
    asks = list(load.arrivals())
    crowd = [ask for ask in asks if 10.0 <= ask.at <= 10.5]
    heads = {ask.pages[: 10 * UNIT] for ask in crowd}
    assert len(crowd) >= 40
    assert len(heads) <= 3
    assert any(sum(ask.pages.startswith(head) for ask in asks) == 40 for head in heads)


def test_turns_of_a_session_continue_each_other() -> None:
    load = opened("gen:sessions,prefix=320,tail=64,think=1")
    one, two = next(load.arrivals()), next(load.arrivals())
    assert common(one, two, load.page) == 20
    further = load.answered(one, 100.0)
    assert further is not None
    assert further.at > 100.0
    assert further.pages.startswith(one.pages[: (one.prompt + one.output) // load.page * UNIT])


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("gen:nothing", "unknown generator 'nothing'"),
        ("gen:groups,colour=3", "unknown setting 'colour'"),
        ("gen:groups,rate=fast", "rate=fast: a number is needed"),
        ("gen:groups,groups=1.5", "groups=1.5: a number is needed"),
        ("gen:groups,rate=0", "rate=0: out of range"),
        ("gen:groups,rate=nan", "rate=nan: out of range"),
        ("gen:bursts,every=0.000000001", "every=0.000000001: out of range"),
        ("gen:groups,prefix=999999999999", "prefix=999999999999: out of range"),
    ],
)
def test_a_generator_with_a_mistake(words: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        opened(words)
