"""The error event of a broken stream: its format, and that the client reads it wherever the worker broke off."""

from __future__ import annotations

import json

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.errors import StreamBroken, WorkerInvalid
from sglang_router.wire import sse
from sglang_router.wire.framing import Chunked, Framing, Sized, UntilClose
from sglang_router.wire.sse import MOST_HELD, EventSplitter, error_event, last_event

EVENT = b'data: {"error": "x"}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
STREAM = b"b;a=b\r\ndata: one\n\n\r\nb\r\ndata: two\n\n\r\n"
"""Two chunks of 11 bytes with one event each."""


def read_event(event: bytes) -> tuple[str, dict[str, object]]:
    """Return name and data, as a client of server-sent events reads them."""
    *lines, last, after = event.decode().split("\n")
    assert (last, after) == ("", "")
    fields = dict(line.split(": ", 1) for line in lines)
    assert len(fields) == len(lines)
    return fields.get("event", "message"), json.loads(fields["data"])


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/completions", b"/generate"])
def test_openai_s_error_event(path: bytes) -> None:
    error = StreamBroken("It broke\nin two.")
    name, data = read_event(error_event(path, error))
    assert (name, data) == ("message", json.loads(error.body()))
    assert data == {
        "error": {"message": "It broke\nin two.", "type": "server_error", "code": "stream_broken", "param": None}
    }


def test_the_error_event_of_messages() -> None:
    name, data = read_event(error_event(b"/v1/messages", StreamBroken("It broke.")))
    assert name == "error"
    assert data == {"type": "error", "error": {"type": "api_error", "message": "It broke."}}


def test_the_error_event_of_responses() -> None:
    name, data = read_event(error_event(b"/v1/responses", StreamBroken("It broke.")))
    assert name == "error"
    assert data == {"type": "error", "code": "stream_broken", "message": "It broke.", "param": None}


@given(st.text(), st.sampled_from([b"/v1/chat/completions", b"/v1/messages", b"/v1/responses"]))
def test_no_message_breaks_out_of_the_event(message: str, path: bytes) -> None:
    _, data = read_event(error_event(path, StreamBroken(message)))
    error = data.get("error", data)
    assert isinstance(error, dict)
    assert error["message"] == (message or StreamBroken.message)


# -- what the client sees ----------------------------------------------------------------------------------------------


def seen(raw: bytes) -> tuple[bytes, list[int], bool]:
    """Return the content that a client gets, the ends of the chunks in it, and whether the message ended properly."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw)
    client.receive_data(b"")
    content, ends = b"", []
    try:
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                content += event.data
                if event.chunk_end:
                    ends.append(len(content))
    except h11.RemoteProtocolError:
        return content, ends, False
    return content, ends, True


def broken_at(cut: int) -> Chunked:
    framing = Chunked()
    assert framing.feed(STREAM[:cut]) == -1
    return framing


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_wherever_a_chunked_stream_breaks(cut: int) -> None:
    last = last_event(EVENT, broken_at(cut), chunked=True)
    in_size_line = 0 < cut < 7 or 20 < cut < 23
    assert (last is None) is in_size_line
    if last is None:
        return
    raw = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    before, _, _ = seen(raw + STREAM[:cut])
    content, ends, clean = seen(raw + STREAM[:cut] + last)
    assert not clean
    assert content.startswith(before)
    assert content[len(before) :].lstrip(b"\n") == EVENT
    assert content.endswith(b"\n\n" + EVENT)
    assert ends[-1] == len(content)


def test_behind_a_read_that_was_not_passed_on() -> None:
    """The client has "b;a=b", and nothing can follow it; or the CR of a CRLF, whose LF is still missing."""
    for cut, last in ((5, None), (19, b"\n" + _chunk(b"\n\n" + EVENT))):
        framing = broken_at(cut)
        with pytest.raises(WorkerInvalid):
            framing.feed(b"\0junk")
        assert last_event(EVENT, framing, chunked=True) == last


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


@pytest.mark.parametrize("sent", [STREAM + b"0\r\n", STREAM + b"0\r\nA: b\r\n", STREAM + b"0\r\nA"])
def test_behind_the_last_chunk_there_is_no_place(sent: bytes) -> None:
    framing = Chunked()
    framing.feed(sent)
    assert last_event(EVENT, framing, chunked=True) is None


@pytest.mark.parametrize(("missing", "fills"), [(65534, True), (65535, False), (1 << 40, False)])
def test_a_large_hole_is_not_filled(missing: int, fills: bool) -> None:
    framing = Chunked()
    framing.feed(b"%x\r\n" % missing)
    last = last_event(EVENT, framing, chunked=True)
    assert (last is not None) is fills
    if last is not None:
        assert last == b"\n" * missing + b"\r\n" + _chunk(b"\n\n" + EVENT)


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_a_client_of_http_1_0_is_sent_the_event_bare(cut: int) -> None:
    """It is sent the content without its coding, so there is no chunk to complete; only the close shows the break."""
    assert last_event(EVENT, broken_at(cut), chunked=False) == b"\n\n" + EVENT


@pytest.mark.parametrize(("framing", "last"), [(UntilClose(), b"\n\n" + EVENT), (Sized(100), None)])
def test_streams_without_chunks(framing: Framing, last: bytes | None) -> None:
    framing.feed(b"data: on")
    assert last_event(EVENT, framing, chunked=False) == last


@pytest.mark.parametrize("size", [64, 1000, 65536])
def test_f24_an_event_of_any_length_is_looked_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was held was searched again with each read: one event of 16 MiB took 909 ms, one of 300 MB 22 s."""
    searched = 0
    search = sse._last_end

    def counted(data: bytes) -> int:
        nonlocal searched
        searched += len(data)
        return search(data)

    monkeypatch.setattr(sse, "_last_end", counted)
    splitter, event = EventSplitter(), b"data: " + b"x" * (4 << 20) + b"\n\n"
    reads = [event[at : at + size] for at in range(0, len(event), size)]
    passed, most = b"", 0
    for read in reads:
        passed += splitter.feed(read)
        most = max(most, splitter._size)
    assert passed == event
    assert most <= MOST_HELD, "it is too long to be kept"
    assert searched <= len(event) + 3 * len(reads)
