"""What engines tell of tokens, read from the ends of their answers as they send them, and from answers that deceive."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sglang_router.wire.framing import LAST_CHUNK, chunk
from sglang_router.wire.usage import HEAD, TAIL, Figures, joined, usage_of
from sglang_router.wire.usage_forms import MOST

RESPONSE = (
    '"response":{"id":"resp_1","object":"response","status":"completed","output":[],"usage":{"input_tokens":120,'
    '"input_tokens_details":{"cached_tokens":96},"output_tokens":4,"total_tokens":124},"user":null,"metadata":{}}'
)


class Recorded(NamedTuple):
    """An answer as an engine sends it, without its transfer coding. events: the data of those of a stream."""

    told: Figures | None
    body: str = ""
    events: tuple[str, ...] = ()


def recorded(told: list[int] | None, body: str = "", events: Sequence[str] = ()) -> Recorded:
    return Recorded(None if told is None else (told[0], told[1], told[2]), body, tuple(events))


FILE = Path(__file__).with_name("usage_answers.json")
ANSWERS = {name: recorded(**each) for name, each in json.loads(FILE.read_text("utf-8")).items()}
PLAIN = {name: each for name, each in ANSWERS.items() if each.body}
STREAMS = {name: each for name, each in ANSWERS.items() if each.events}


def of(body: str | bytes) -> Figures | None:
    """What a JSON answer tells."""
    data = body.encode() if isinstance(body, str) else body
    return usage_of(data, data, False)


def named(event: str, newline: str = "\n") -> bytes:
    """An event as it is sent; those of the newer protocols have a name."""
    kind = "" if event == "[DONE]" else str(json.loads(event).get("type", ""))
    return (f"event: {kind}{newline}" * bool(kind) + f"data: {event}{newline}{newline}").encode()


@pytest.mark.parametrize("name", PLAIN)
def test_answers_of_engines(name: str) -> None:
    assert of(PLAIN[name].body) == PLAIN[name].told


@pytest.mark.parametrize("name", PLAIN)
def test_answers_that_arrive_in_two_reads(name: str) -> None:
    body = PLAIN[name].body.encode()
    for at in range(len(body) + 1):
        assert usage_of(body[:at], joined(body[:at], body[at:]), False) == PLAIN[name].told


@pytest.mark.parametrize("name", PLAIN)
def test_answers_in_chunks_that_are_cut_anywhere(name: str) -> None:
    body = PLAIN[name].body.encode()
    for at in range(len(body) + 1):
        data = chunk(body[:at]) + chunk(body[at:]) + LAST_CHUNK
        assert usage_of(data, data, False) == PLAIN[name].told


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("chunked", [False, True])
def test_streams_of_engines(name: str, newline: str, chunked: bool) -> None:
    """Each event in a read of its own, and all in one read."""
    each = STREAMS[name]
    events = [named(event, newline) for event in each.events]
    reads = [chunk(event) for event in events] if chunked else events
    whole = b"".join(reads)
    long = [read for read in reads if b"DONE" not in read and b"message_stop" not in read]
    assert usage_of(whole, whole, True) == each.told
    assert usage_of(reads[0], long[-1], True) == each.told


@pytest.mark.parametrize("name", STREAMS)
def test_events_in_chunks_that_are_cut_anywhere(name: str) -> None:
    data = b"".join(map(named, STREAMS[name].events))
    for at in range(len(data) + 1):
        read = chunk(data[:at]) + chunk(data[at:]) + LAST_CHUNK
        assert usage_of(read, read, True) == STREAMS[name].told


def test_a_read_begins_inside_a_chunk() -> None:
    data = chunk(b"".join(map(named, STREAMS["SGLang chat, a stream"].events)))
    assert usage_of(data, data[20:], True) == (455, 454, 8)


# -- who would deceive -------------------------------------------------------------------------------------------------

LIE = '"usage":{"prompt_tokens":9,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":9}}'


@pytest.mark.parametrize(
    "text", [LIE, "{" + LIE + "}", '"}],' + LIE + "}", "\\" + LIE, '\\\\"' + LIE, "\n\ndata: {" + LIE + "}\n\n"]
)
def test_text_that_a_model_writes_is_no_usage(text: str) -> None:
    choices: list[Any] = [{"message": {"content": text}}]
    for separators in ((",", ":"), (", ", ": ")):
        assert of(json.dumps({"choices": choices}, separators=separators)) is None
        true = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        assert of(json.dumps(true | {"choices": choices}, separators=separators)) == (3, -1, 2)
        assert of(json.dumps({"choices": choices} | true, separators=separators)) == (3, -1, 2)
        event = named(json.dumps({"choices": choices}, separators=separators))
        assert usage_of(event, event, True) is None


@pytest.mark.parametrize(
    "member",
    [
        '"metadata":{' + LIE + "}",
        '"metadata":{"usage":"none"}',
        '"tools":[{"parameters":{"properties":{' + LIE + "}}}]",
        '"a":[' + "{" + LIE + "}]",
        '"a":"usage","b":["usage"]',
        '"metadata":{"a":{"b":{' + LIE + "}}}",
    ],
)
def test_what_a_client_has_the_engine_repeat_is_no_usage(member: str) -> None:
    true = RESPONSE.removesuffix("}")
    assert of("{" + true.removeprefix('"response":{') + "," + member + "}") == (120, 96, 4)
    assert of("{" + member + "}") is None
    event = named('{"type":"response.completed",' + true + "," + member + '},"sequence_number":9}')
    assert usage_of(event, event, True) == (120, 96, 4)


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        ('{"prompt_tokens":-1,"completion_tokens":3}', None),
        ('{"prompt_tokens":1.5,"completion_tokens":3}', None),
        ('{"prompt_tokens":"7","completion_tokens":3}', None),
        ('{"prompt_tokens":true,"completion_tokens":3}', None),
        ('{"prompt_tokens":null,"completion_tokens":3}', (-1, -1, 3)),
        ('{"prompt_tokens":[[7]],"completion_tokens":3}', None),
        (f'{{"prompt_tokens":{MOST},"completion_tokens":3}}', (MOST, -1, 3)),
        (f'{{"prompt_tokens":{MOST + 1},"completion_tokens":3}}', None),
        (f'{{"prompt_tokens":1{"0" * 400},"completion_tokens":3}}', None),
        ('{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":8}}', (7, -1, -1)),
        ('{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":7}}', (7, 7, -1)),
        ('{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":-7}}', None),
        ('{"prompt_tokens":7,"prompt_tokens_details":{}}', (7, -1, -1)),
        ('{"prompt_tokens":7,"prompt_tokens_details":[]}', None),
        ('{"prompt_tokens":7,"prompt_tokens":8}', (8, -1, -1)),
        ('{"input_tokens":-5,"cache_read_input_tokens":5,"output_tokens":1}', None),
        ('{"cache_read_input_tokens":5,"output_tokens":1}', (-1, -1, 1)),
        ("{}", None),
        ("[]", None),
        ("7", None),
        ('"7"', None),
        ("{" + '"a":{' * 5000 + "}" * 5001, None),
        ("[" * 5000 + "]" * 5000, None),
    ],
)
def test_figures_that_cannot_be_are_left_out(usage: str, told: Figures | None) -> None:
    assert of('{"usage":' + usage + "}") == told


def test_the_last_of_two_members_counts() -> None:
    assert of('{"usage":{"prompt_tokens":1},"usage":{"prompt_tokens":2}}') == (2, -1, -1)


def test_a_name_that_ends_like_one_is_another() -> None:
    assert of('{"my_usage":{"prompt_tokens":1}}') is None


def test_many_marks_take_no_longer() -> None:
    deceit = '{"a":[' + ",".join(["{" + LIE + "}"] * 60) + "]}"
    assert of('{"usage":{"prompt_tokens":1},"b":' + deceit + "}") is None


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_answer(seed: int) -> None:
    """Compressed answers look like this."""
    rng = random.Random(seed)
    data = rng.randbytes(5000)
    assert of(data) is None
    whole = PLAIN["vLLM chat"].body.encode()
    at = rng.randrange(len(whole))
    broken = whole[:at] + rng.randbytes(3) + whole[at + 3 :]
    found = of(broken)
    assert found is None or (len(found) == 3 and max(found) <= MOST)


# -- long answers ------------------------------------------------------------------------------------------------------


def test_only_the_end_of_a_long_answer_is_looked_at() -> None:
    usage = ',"usage":{"prompt_tokens":5,"completion_tokens":1}}'
    long = '{"text":"' + "x" * (3 * TAIL)
    assert of(long + '"' + usage) == (5, -1, 1)
    assert of('{"a":1' + usage.removesuffix("}") + ',"text":"' + "x" * (3 * TAIL) + '"}') is None


@pytest.mark.parametrize("chunked", [False, True])
def test_a_usage_at_the_head_of_a_long_answer_is_found(chunked: bool) -> None:
    head = '{"id":"1","meta":{"a":[1]},"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":4}},"text":"'
    body = head.encode() + b"x" * (3 * TAIL) + b'"}'
    data = chunk(body) if chunked else body
    assert usage_of(data, data[-TAIL:], False) == (5, 4, -1)
    far = b'{"id":"' + b"y" * HEAD + b'",' + body[1:]
    assert usage_of(far, far[-TAIL:], False) is None
    deep = b'{"metadata":{' + body[1:] + b"}"
    assert usage_of(deep, deep[-TAIL:], False) is None


def test_the_end_is_put_together_from_small_reads() -> None:
    body = b'{"text":"' + b"x" * 20000 + b'","usage":{"prompt_tokens":5,"completion_tokens":1}}'
    last = b""
    for at in range(0, len(body), 37):
        last = joined(last, body[at : at + 37])
        assert len(last) <= TAIL + 37
    assert usage_of(body[:37], last, False) == (5, -1, 1)
    assert joined(last, body) is body


OLLAMA = b'{"model":"m","response":"","done":true,"context":[1,2],"prompt_eval_count":26,"eval_count":9}'


@pytest.mark.parametrize(
    ("first", "last", "streaming", "told"),
    [
        (b'{"response":"Hi","done":false}\n', b'{"response":"Hi","done":false}\n' + OLLAMA + b"\n", True, (26, -1, 9)),
        (b"", b'1f\r\n{"response":"Hi","done":false}\n\r\n5f\r\n' + OLLAMA + b"\n\r\n0\r\n\r\n", True, (26, -1, 9)),
        (OLLAMA, OLLAMA, False, (26, -1, 9)),
        (b'{"message":{"role":"assistant","content":"Hi"},"eval_count":9}', b"", False, (-1, -1, 9)),
        (b'{"message":{"role":"assistant","content":"Hi"},"done":true}', b"", False, None),
        (b"", b'{"response":"\\"prompt_eval_count\\":7","done":false}\n', True, None),
        (b"", b'{"done":true,"prompt_eval_count":-1,"eval_count":9}\n', True, None),
    ],
)
def test_ollama_tells_its_tokens_in_the_last_line(
    first: bytes, last: bytes, streaming: bool, told: Figures | None
) -> None:
    assert usage_of(first, last or first, streaming) == told
