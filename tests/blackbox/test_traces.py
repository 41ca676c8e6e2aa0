"""Traces of the command, as a collector gets them and as engines see them."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from collectors import Collector, Got, collector
from routers import WITHIN, RouterProcess, free_port, router_process

CHAT = "/v1/chat/completions"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
USAGE = {"prompt_tokens": 55, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 40}}


class Engine(http.server.ThreadingHTTPServer):
    """An engine that keeps the headers of the requests that it is sent, and streams as a test lets it.

    failing  answer 500
    more     the rest of a stream is sent when it is set
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _EngineHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[dict[str, str]] = []
        self.failing = False
        self.more = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: the router may close a connection at any time."""


class _EngineHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def do_GET(self) -> None:
        self._answer(200, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append({name.lower(): value for name, value in self.headers.items()})
        if self.server.failing:
            self._answer(500, b"{}")
        elif body.get("stream"):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self._event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
            assert self.server.more.wait(WITHIN)
            self._event({"choices": [], "usage": USAGE})
            self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            message = {"role": "assistant", "content": "hello"}
            self._answer(200, json.dumps({"choices": [{"message": message}], "usage": USAGE}).encode())

    def _event(self, value: object) -> None:
        event = f"data: {json.dumps(value)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


@contextlib.contextmanager
def engines(number: int) -> Iterator[list[Engine]]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(Engine()) for _ in range(number)]
        for each in made:
            thread = threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join, WITHIN)
            stack.callback(each.shutdown)
        yield made


@contextlib.contextmanager
def traced(
    got: Collector, workers: list[Engine], *flags: str, protocol: str = "http/protobuf"
) -> Iterator[RouterProcess]:
    wanted = ("--enable-trace", "--otlp-traces-endpoint", got.endpoint, "--otlp-traces-protocol", protocol)
    with router_process([each.url for each in workers], *wanted, *flags) as router:
        yield router


def chat(router: RouterProcess, **more: Any) -> dict[str, Any]:
    headers = {name: more.pop(name) for name in ("traceparent", "tracestate", "x_smg_routing_key") if name in more}
    body = {"model": "m", "messages": [{"role": "user", "content": "secret-prompt"}], **more}
    answer = router.post(CHAT, body, **headers)
    return {"status": answer.status}


def one(spans: list[Got], kind: str) -> Got:
    (found,) = [span for span in spans if span.kind == kind]
    return found


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_request_is_a_trace(protocol: str) -> None:
    with collector(protocol) as got, engines(1) as workers, traced(got, workers, protocol=protocol) as router:
        before = time.time_ns()
        assert chat(router, x_smg_routing_key="session-7")["status"] == 200
        spans = got.of_requests(1)
        assert len(spans) == 3
        server, client, decision = one(spans, "SERVER"), one(spans, "CLIENT"), one(spans, "INTERNAL")

        assert {span.trace for span in spans} == {server.trace}
        assert server.parent == ""
        assert client.parent == decision.parent == server.id
        assert before - 5e9 < server.start <= decision.start <= decision.end <= client.end <= server.end
        assert server.end < time.time_ns() + 5e9

        assert server.name == f"POST {CHAT}"
        assert server.attributes["http.request.method"] == "POST"
        assert server.attributes["http.route"] == CHAT
        assert server.attributes["http.response.status_code"] == 200
        assert not server.error

        assert client.name == "chat m"
        told = {name: value for name, value in client.attributes.items() if name.startswith("gen_ai.usage.")}
        assert told == {
            "gen_ai.usage.input_tokens": 55,
            "gen_ai.usage.cache_read.input_tokens": 40,
            "gen_ai.usage.output_tokens": 12,
        }
        assert client.attributes["gen_ai.operation.name"] == "chat"
        assert client.attributes["gen_ai.request.model"] == "m"
        assert client.attributes["gen_ai.conversation.id"] == "session-7"
        assert client.attributes["server.port"] == workers[0].server_address[1]
        assert client.attributes["http.response.status_code"] == 200
        assert "error.type" not in client.attributes

        assert decision.attributes["sglang_router.policy"] == "cache_aware"
        assert decision.attributes["sglang_router.worker"] == workers[0].url
        assert decision.attributes["sglang_router.candidates"] == 1
        assert decision.attributes["sglang_router.branch"]

        assert workers[0].seen[0]["traceparent"] == f"00-{client.trace}-{client.id}-01", "the engine's parent"
        assert got.resource["service.name"] == "sglang-router"
        assert "secret-prompt" not in repr(spans)


def test_a_trace_of_the_client_goes_on() -> None:
    with collector("http/protobuf") as got, engines(1) as workers, traced(got, workers) as router:
        chat(router, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="a=1")
        spans = got.of_requests(1)
        assert {span.trace for span in spans} == {TRACE}
        assert one(spans, "SERVER").parent == PARENT
        assert workers[0].seen[0]["traceparent"] == f"00-{TRACE}-{one(spans, 'CLIENT').id}-01"
        assert workers[0].seen[0]["tracestate"] == "a=1"


@pytest.mark.parametrize("given", [f"00-{'0' * 32}-{PARENT}-01", "nonsense", f"ff-{TRACE}-{PARENT}-01"])
def test_a_traceparent_that_is_none_begins_a_trace(given: str) -> None:
    with collector("http/protobuf") as got, engines(1) as workers, traced(got, workers) as router:
        chat(router, traceparent=given, tracestate="a=1")
        server = one(got.of_requests(1), "SERVER")
        assert server.parent == ""
        assert server.trace not in given
        assert "tracestate" not in workers[0].seen[0], "it belongs to a trace that is not known"


def test_who_does_not_sample_decides_for_all_behind() -> None:
    """A client's trace that is not recorded is left alone; one that begins here and is not recorded says so."""
    with collector("http/protobuf") as got, engines(1) as workers:
        with traced(got, workers, "--trace-sample-ratio", "0") as router:
            chat(router)
            chat(router, traceparent=f"00-{TRACE}-{PARENT}-00")
            chat(router, traceparent=f"00-{TRACE}-{PARENT}-01")
        seen = [each["traceparent"] for each in workers[0].seen]
        assert seen[0].endswith("-00")
        assert seen[1] == f"00-{TRACE}-{PARENT}-00"
        assert [span.trace for span in got.of_requests(1) if span.kind == "SERVER"] == [TRACE], "the last one only"


def test_each_attempt_has_a_span() -> None:
    with collector("http/protobuf") as got, engines(2) as workers:
        workers[0].failing = True
        with traced(got, workers, "--policy", "round_robin") as router:
            for _ in range(2):
                assert chat(router)["status"] == 200
            spans = got.of_requests(2)
        failed = [span for span in spans if span.kind == "CLIENT" and span.error]
        assert {span.attributes["error.type"] for span in failed} == {"failed"}
        assert failed[0].attributes["http.response.status_code"] == 500
        attempts = [span for span in spans if span.trace == failed[0].trace and span.kind == "CLIENT"]
        assert sorted(span.attributes["sglang_router.attempt"] for span in attempts) == [1, 2]
        server = next(span for span in spans if span.kind == "SERVER" and span.trace == failed[0].trace)
        assert {span.parent for span in attempts} == {server.id}
        assert server.attributes["sglang_router.retries"] == 1
        assert not server.error
        parents = {each["traceparent"].split("-")[2] for worker in workers for each in worker.seen}
        assert {span.id for span in attempts} <= parents
        first, second = sorted(attempts, key=lambda span: span.start)
        assert first.end <= second.end


def test_a_stream_is_open_until_its_last_chunk() -> None:
    with collector("http/protobuf") as got, engines(1) as workers, traced(got, workers) as router:
        asking = threading.Thread(target=chat, args=(router,), kwargs={"stream": True})
        asking.start()
        router.until(lambda: bool(workers[0].seen))
        router.until(lambda: router.worker(workers[0].url)["load"] == 1)
        resumed = time.time_ns()
        workers[0].more.set()
        asking.join(WITHIN)
        client = one(got.of_requests(1), "CLIENT")
        assert client.start < resumed <= client.end
        assert client.attributes["gen_ai.usage.output_tokens"] == 12
        assert client.attributes["gen_ai.response.time_to_first_chunk"] >= 0.0


def test_both_legs_of_a_pair_have_a_span() -> None:
    with collector("http/protobuf") as got, engines(2) as (prefill, decode):
        pair = ("--pd-disaggregation", "--prefill", prefill.url, "--decode", decode.url)
        with traced(got, [], *pair) as router:
            router.until_healthy(prefill.url, decode.url)
            assert chat(router)["status"] == 200
            spans = got.of_requests(1)
        legs = {str(span.attributes["sglang_router.worker.role"]): span for span in spans if span.kind == "CLIENT"}
        assert legs.keys() == {"prefill", "decode"}
        for engine, role in ((prefill, "prefill"), (decode, "decode")):
            assert engine.seen[0]["traceparent"].split("-")[2] == legs[role].id
            assert legs[role].parent == one(spans, "SERVER").id


def test_relay_processes_and_the_decider_tell_the_same_ids() -> None:
    with collector("http/protobuf") as got, engines(1) as workers:
        with traced(got, workers, "--relay-processes", "2") as router:
            router.until_healthy(workers[0].url)
            assert chat(router)["status"] == 200
            assert chat(router, traceparent=f"00-{TRACE}-{PARENT}-01")["status"] == 200
            spans = got.of_requests(2)
        clients = {f"00-{span.trace}-{span.id}-01" for span in spans if span.kind == "CLIENT"}
        assert clients == {each["traceparent"] for each in workers[0].seen}
        assert {span.parent for span in spans if span.kind == "SERVER"} == {"", PARENT}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_without_a_collector_spans_are_lost_and_counted(protocol: str) -> None:
    away = Collector()
    away.endpoint = f"127.0.0.1:{free_port()}"
    with engines(1) as workers, traced(away, workers, protocol=protocol) as router:
        for _ in range(3):
            assert chat(router)["status"] == 200
        router.until(lambda: router.samples().total("sgl_router_trace_spans_total", result="lost") == 9)
        assert router.log().count("traces cannot be sent to") == 1


def test_a_refused_request_is_a_span_too() -> None:
    with collector("http/protobuf") as got, traced(got, []) as router:
        assert chat(router)["status"] == 503
        (span,) = got.of_requests(1)
        assert span.attributes["http.response.status_code"] == 503
        assert span.attributes["error.type"] == "no_workers"
        assert span.error


def test_a_name_that_cannot_be_sent_takes_no_other_span_with_it() -> None:
    with collector("http/protobuf") as got, engines(1) as workers, traced(got, workers) as router:
        for name in ("\ud800", "m"):
            chat(router, model=name)
        spans = got.of_requests(2)
        assert {span.attributes["gen_ai.request.model"] for span in spans if span.kind == "CLIENT"} == {"?", "m"}


def test_without_the_option_the_traceparent_passes() -> None:
    with engines(1) as workers, router_process([workers[0].url]) as router:
        chat(router, traceparent=f"00-{TRACE}-{PARENT}-01")
        assert workers[0].seen[0]["traceparent"] == f"00-{TRACE}-{PARENT}-01"
        assert router.samples().total("sgl_router_trace_spans_total") == 0
