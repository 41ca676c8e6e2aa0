"""Check that the spans of a real engine join the router's: one tree for each request.

    client's traceparent                a trace id and a span id that no process here knows
      SERVER  of the router             its parent is the client's span
        CLIENT of the first attempt     a worker that always fails; it gets this span's id as its parent
        CLIENT of the second            the engine
          the engine's spans            all of them below this one

Router and engine send their spans to the same collector, in batches and from several processes. So a check waits until
a trace is whole: no span in it has a parent that is unknown, and the engine's are there. What must not be sent is
looked for at the end, when later spans have arrived.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import secrets
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from scripts.real_engines.launched import Answer, CourseError, Launched
from scripts.real_engines.results import Results
from scripts.real_engines.text import document

from collectors import Collector, Got

ROUTER = "sglang-router"
"""The router's service.name."""
CHAT = "/v1/chat/completions"
TRACEPARENT = "traceparent"
ANSWER = "gen_ai.request.id"
"""The attribute in which engines tell the id of their answer; vLLM adds the number of the prompt to it."""


class FailingWorker(http.server.ThreadingHTTPServer):
    """A worker that answers 500 to each request. parents: the ids of spans that it was told as its parent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Failing)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.parents: list[str] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class _Failing(http.server.BaseHTTPRequestHandler):
    server: FailingWorker

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.parents.append(str(self.headers[TRACEPARENT]).split("-")[2])
        self.send_response(500)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing to standard error."""


class Tree(NamedTuple):
    """The spans of one request.

    router   all of the router: server, the request's own; clients, those of the attempts, in their order
    engine   all of the engine: tops, those whose parent is not the engine's
    """

    router: list[Got]
    server: Got
    clients: list[Got]
    engine: list[Got]
    tops: list[Got]


class Joined(NamedTuple):
    """The figures of a run: requests sent, how many of them were recorded and retried, and the spans of these."""

    requests: int
    recorded: int
    retried: int
    router: int
    engine: int


class Traces:
    """Sends requests through a traced router to one traced engine, and compares. What is wrong goes to `results`."""

    def __init__(self, run: Launched, got: Collector, results: Results) -> None:
        self._run = run
        self._got = got
        self._results = results
        self._trees: list[Tree] = []

    def check(self) -> Joined:
        """Make all checks. The router records no trace that begins with it (--trace-sample-ratio 0)."""
        unsampled = secrets.token_hex(16)
        given: tuple[dict[str, str], ...] = ({TRACEPARENT: f"00-{unsampled}-{secrets.token_hex(8)}-00"}, {})
        silent = tuple(answer_id(self._ask(CHAT, {"messages": _message("SILENT")}, each)) for each in given)
        chat = {"messages": _message("TRACED")}
        for path, body in ((CHAT, chat), ("/v1/completions", {"prompt": document("TRACED", 200)})):
            self._joined(path, path, body)
            self._joined(f"{path}, streamed", path, body | {"stream": True})
        with FailingWorker() as failing, failing.running():
            self._retried(failing, chat)
        sent = self._got.until(bool)
        told = [span for span in sent if span.trace == unsampled or _answer(span).startswith(silent)]
        self._results.expect(not told, f"spans of requests that are not recorded: {told}")
        return Joined(
            len(silent) + len(self._trees),
            len(self._trees),
            sum(len(tree.clients) > 1 for tree in self._trees),
            sum(len(tree.router) for tree in self._trees),
            sum(len(tree.engine) for tree in self._trees),
        )

    # -- one request ---------------------------------------------------------------------------------------------------

    def _joined(self, what: str, path: str, body: dict[str, Any]) -> None:
        """Check one request that the engine answers at once."""
        tree, answer = self._traced(path, body)
        self._below(what, tree, answer)
        self._results.expect(len(tree.clients) == 1, f"{what}: {len(tree.clients)} CLIENT spans")

    def _retried(self, failing: FailingWorker, body: dict[str, Any]) -> None:
        """Check requests in turn to the engine and to a worker that fails."""
        added = self._run.ask(
            "POST", "/workers", {"url": failing.url, "model_id": "tiny", "disable_health_check": True}
        )
        if added.status not in (200, 202):
            raise CourseError(f"POST /workers: {added.status} {added.body[:200]!r}")
        self._run.until(lambda: self._run.healthy() == 2, 30, "the worker that fails gets no requests")
        firsts = []
        for _ in range(2):  # --policy round_robin: of two requests at least one begins at the worker that fails
            tree, answer = self._traced(CHAT, body)
            self._below("after a retry", tree, answer)
            if len(tree.clients) == 2:
                firsts.append(tree.clients[0].id)
                errors = [span.error for span in tree.clients]
                self._results.expect(errors == [True, False], f"errors of the attempts: {errors}")
        self._results.expect(bool(firsts), "no request was retried")
        self._results.expect(failing.parents == firsts, f"it was told {failing.parents}, the spans are {firsts}")

    def _traced(self, path: str, body: dict[str, Any]) -> tuple[Tree, Answer]:
        """Send a request that is recorded; wait until its spans are one tree below the client's span."""
        trace, parent = secrets.token_hex(16), secrets.token_hex(8)
        answer = self._ask(path, body, {TRACEPARENT: f"00-{trace}-{parent}-01"})
        try:
            sent = self._got.until(lambda spans: whole(_of(trace, spans), parent))
        except AssertionError:
            told = "".join(f"\n    {span}" for span in _of(trace, self._got.until(lambda _: True)))
            raise CourseError(f"{path}: its spans do not become one tree below {parent}: {told or 'none'}") from None
        self._trees.append(tree_of(_of(trace, sent)))
        return self._trees[-1], answer

    def _ask(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        answer = self._run.ask("POST", path, {"model": "tiny", "max_tokens": 8, "temperature": 0, **body}, headers)
        if answer.status != 200:
            raise CourseError(f"{path}: {answer.status} {answer.body[:300]!r}")
        self._results.requests += 1
        return answer

    def _below(self, what: str, tree: Tree, answer: Answer) -> None:
        """Check that the engine's spans are those of this answer, and all below the attempt that got it."""
        expect, last = self._results.expect, tree.clients[-1]
        parents = {top.parent for top in tree.tops}
        expect(parents == {last.id}, f"{what}: the engine's spans are below {parents}, not {last.id}")
        expect({span.parent for span in tree.clients} == {tree.server.id}, f"{what}: CLIENT spans are not below SERVER")
        named = [_answer(top) for top in tree.tops]
        told = any(each.startswith(answer_id(answer)) for each in named)
        expect(told, f"{what}: the engine's spans are of {named}, the answer is {answer_id(answer)}")


def _message(seed: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": document(seed, 200)}]


def answer_id(answer: Answer) -> str:
    """Return the id of an answer, of a stream that of its first event."""
    return str(json.loads(answer.body.partition(b"\n\n")[0].removeprefix(b"data: "))["id"])


def _answer(span: Got) -> str:
    """Return the id of the answer that a span of an engine tells; "" for none."""
    return str(span.attributes.get(ANSWER, ""))


def _of(trace: str, spans: list[Got]) -> list[Got]:
    return [span for span in spans if span.trace == trace]


def whole(spans: list[Got], parent: str) -> bool:
    """Whether all spans of a trace are one tree below the client's span, with the router's and some of the engine's."""
    known = {span.id for span in spans}
    own = {span.kind for span in spans if span.service == ROUTER}
    return (
        {"SERVER", "CLIENT"} <= own
        and any(span.service != ROUTER for span in spans)
        and [span.service for span in spans if span.parent == parent] == [ROUTER]
        and all(span.parent in known or span.parent == parent for span in spans)
    )


def tree_of(spans: list[Got]) -> Tree:
    """Sort the spans of a trace that is whole."""
    router = [span for span in spans if span.service == ROUTER]
    (server,) = [span for span in router if span.kind == "SERVER"]
    clients = sorted((span for span in router if span.kind == "CLIENT"), key=_attempt)
    engine = [span for span in spans if span.service != ROUTER]
    known = {span.id for span in engine}
    return Tree(router, server, clients, engine, [span for span in engine if span.parent not in known])


def _attempt(span: Got) -> int:
    return int(span.attributes["sglang_router.attempt"])
