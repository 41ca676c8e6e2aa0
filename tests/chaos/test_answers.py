"""The client of the chaos runs must notice what is wrong: a checker that cannot fail proves nothing.

Real answers of an engine, unchanged and damaged in every way that a router could.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from scripts.reliability.answers import PATHS, Question, Questions, error_event, fault_of

from engines import engine_processes
from routers import ask

ERROR = b'data: {"error":{"message":"m","type":"t","code":"stream_broken","param":null}}\n\n'


class Recorded(NamedTuple):
    question: Question
    body: bytes

    def spoilt(self, *parts: list[bytes]) -> bytes:
        """Return a stream of these events instead."""
        return b"".join(event + b"\n\n" for part in parts for event in part)

    def halves(self) -> tuple[list[bytes], list[bytes]]:
        events = self.body.removesuffix(b"\n\n").split(b"\n\n")
        return events[: len(events) // 2], events[len(events) // 2 :]


@pytest.fixture(scope="module")
def recorded() -> Iterator[dict[tuple[str, bool], Recorded]]:
    """Return an answer for each path, streamed and whole."""
    found: dict[tuple[str, bool], Recorded] = {}
    questions = Questions(random.Random(1), 60, (30, 40))
    with engine_processes(1, "--speed", "0") as (url,):
        while len(found) < 2 * len(PATHS):
            question = questions.next()
            body = ask(url, "POST", question.path, question.body).body
            found[question.path, question.streamed] = Recorded(question, body)
        yield found


@pytest.fixture(params=PATHS)
def stream(recorded: dict[tuple[str, bool], Recorded], request: pytest.FixtureRequest) -> Recorded:
    return recorded[request.param, True]


@pytest.fixture(params=PATHS)
def whole(recorded: dict[tuple[str, bool], Recorded], request: pytest.FixtureRequest) -> Recorded:
    return recorded[request.param, False]


def test_right_answers(stream: Recorded, whole: Recorded) -> None:
    assert fault_of(stream.question, stream.body, True) == ""
    assert fault_of(whole.question, whole.body, True) == ""


def test_a_wrong_byte_in_a_whole_answer(whole: Recorded) -> None:
    end = whole.question.text.encode()[-4:]
    assert fault_of(whole.question, whole.body.replace(end, b"xxxx", 1), True)
    assert fault_of(whole.question, whole.body[:-1], True)


def test_a_break_between_events_says_so(stream: Recorded) -> None:
    first, _ = stream.halves()
    told = stream.spoilt(first) + b"\n\n" + ERROR
    assert fault_of(stream.question, told, False) == ""
    assert error_event(told) == "stream_broken"


def test_a_break_inside_an_event(stream: Recorded) -> None:
    first, second = stream.halves()
    torn = stream.spoilt(first) + second[0][:20] + b"\n\n" + ERROR
    assert fault_of(stream.question, torn, False) == ""
    assert error_event(torn) == "stream_broken"


def test_a_clean_end_without_the_last_event(stream: Recorded) -> None:
    first, second = stream.halves()
    assert fault_of(stream.question, stream.spoilt(first, second[:-1]), True)
    assert fault_of(stream.question, stream.spoilt(first) + ERROR, True)


def test_an_event_that_comes_twice(stream: Recorded) -> None:
    first, second = stream.halves()
    assert fault_of(stream.question, stream.spoilt(first, first[-1:], second), True)


def test_events_in_another_order(stream: Recorded) -> None:
    first, second = stream.halves()
    assert fault_of(stream.question, stream.spoilt([first[1], first[0]], first[2:], second), True)


def test_an_event_that_is_missing(stream: Recorded) -> None:
    first, second = stream.halves()
    fault = fault_of(stream.question, stream.spoilt(first, second[1:]), True)
    assert fault or stream.question.path == "/generate", "only there each event holds all the text so far"


def test_the_end_of_another_answer(recorded: dict[tuple[str, bool], Recorded], stream: Recorded) -> None:
    first, _ = stream.halves()
    for other in recorded.values():
        if other.question.streamed and other is not stream:
            assert fault_of(stream.question, stream.spoilt(first, other.halves()[1]), True)
