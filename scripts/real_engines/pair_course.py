"""The checks of a prefill/decode pair of real engines behind one router after another.

    requests     every kind, streamed and not; log probabilities and cached tokens; 40 at once, more than the window
    samples      chat with n = 2
    clients      one leaves while a leg waits, one in mid-stream
    fields       that only a router may set, sent by a client
    kill -9      of a decode, and of the prefill, while requests wait there: seconds until all are answered

After each step the engines must be empty: no request in any queue, no token used. What holds for ours is an error
otherwise; of the other routers it is only told.

An engine is stopped (SIGSTOP) before it is killed, so that requests certainly wait there when it dies.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scripts.real_engines.engines import SetupError
from scripts.real_engines.launched import Answer, CourseError
from scripts.real_engines.pair_routers import FRONTS, OURS, FrontRouter
from scripts.real_engines.pairs import KINDS, MODEL, SGLANG_PD, PairEngine, PairKind, RealPair, call, enter_namespace
from scripts.real_engines.text import document

DECODES = 2
PATIENCE = 20.0
"""Seconds after which a client gives up a request that hangs."""
SETTLED = 3.0
"""Seconds within which engines must be empty after a request has ended. Engines alone take 9 to 14."""
HELD = 35.0
"""The same after a prefill has died: its SGLang decodes keep what it may still write to, for 30 s."""
BACK = 90.0
"""Seconds for which requests are sent after an engine has come back, until one is answered."""
QUICK = 1.5
"""Seconds within which requests must be answered after a kill -9, on a busy machine."""
HAND_OVERS = 40
"""Of 45 requests, 44 with one prompt; vLLM tells the last ones of a burst with its next step."""
TOLD = "fronts.json"
ALIVE = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")


@dataclass
class Front:
    """What one router did.

    Times are seconds; those that do not exist are None. `moved` are transfers of blocks (vLLM); `stuck` are tokens
    (SGLang) or requests (vLLM) left on engines, the most after any step.
    """

    name: str
    requests: int = 0
    failed: int = 0
    forty: float | None = None
    samples: str = ""
    decode_killed: float | None = None
    decode_lost: int = 0
    prefill_killed: float | None = None
    prefill_lost: int = 0
    stuck: int = 0
    fields: str = ""
    moved: int = 0
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)
            print(f"    WRONG  {self.name}: {what}", flush=True)


class PairCourse:
    """All checks behind one router."""

    def __init__(self, pair: RealPair, router: FrontRouter) -> None:
        self._pair = pair
        self._router = router
        self._sglang = pair.kind is SGLANG_PD
        self.front = Front(router.kind.name)

    @property
    def _ours(self) -> bool:
        return self.front.name == OURS

    def run(self) -> Front:
        for step in (
            *(self._requests, self._samples, self._client_waits, self._client_streams, self._fields),
            *(self._kill_decode, self._kill_prefill),
        ):
            began = time.monotonic()
            step()
            self._settle(step.__name__.strip("_"))
            print(f"    {step.__name__.strip('_').replace('_', ' ')}: {time.monotonic() - began:.1f} s", flush=True)
        return self.front

    # -- asking ------------------------------------------------------------------------------------------

    def _ask(self, path: str, body: Any, timeout: float = PATIENCE) -> tuple[Answer, float]:
        """Return the answer, with status 0 if there is none, and the moment when it had come."""
        try:
            answer = call(self._router.url, "POST", path, body, timeout)
        except OSError as error:
            answer = Answer(0, {}, repr(error).encode())
        return answer, time.monotonic()

    def _served(self, name: str, path: str, body: Any, holds: Callable[[Any], bool]) -> None:
        """Send one request whose answer must be whole; `holds` gets it, of a stream the list of its events."""
        answer, _ = self._ask(path, body)
        self.front.requests += 1
        good = answer.status == 200
        if good:
            try:
                good = holds(_events(answer) if body.get("stream") else answer.json())
            except (KeyError, IndexError, TypeError, ValueError):
                good = False
        self.front.failed += not good
        if not good:
            print(f"      {name}: {answer.status} {answer.body[:150]!r}", flush=True)
        if self._ours:
            self.front.expect(good, f"{name}: {answer.status} {answer.body[:300]!r}")

    def _settle(self, step: str, within: float = SETTLED) -> None:
        """Count what is left on the engines; empty them for the next step."""
        deadline = time.monotonic() + within
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.front.stuck = max(self.front.stuck, left)
        if left:
            print(f"      {step}: {left} left on the engines", flush=True)
        if self._ours:
            self.front.expect(not left, f"{step}: {left} left on the engines")
        if left and self._sglang:
            for engine in self._living():
                call(engine.url, "POST", "/abort_request", {"rid": "", "abort_all": True})

    def _living(self) -> list[PairEngine]:
        return [engine for engine in self._pair.engines if engine.alive()]

    def _left(self) -> int:
        return sum(left_on(self._pair.kind, engine) for engine in self._living())

    # -- requests ----------------------------------------------------------------------------------------

    def _requests(self) -> None:
        text, count = document("PAIR", 300), 6
        chat = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": count, "temperature": 0}
        plain = {"model": MODEL, "prompt": text, "max_tokens": count, "temperature": 0}
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        before = self._moved()
        self._served("completion", "/v1/completions", plain, lambda a: a["usage"]["completion_tokens"] == count)
        self._served("chat", "/v1/chat/completions", chat, lambda a: a["usage"]["completion_tokens"] == count)
        self._served(
            *("chat, streamed", "/v1/chat/completions", {**chat, **usage}),
            lambda events: events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] == count,
        )
        two = {**plain, "prompt": [text + "X", text + "Y"]}
        self._served("two prompts", "/v1/completions", two, lambda a: len(a["choices"]) == 2)
        ids = {**plain, "prompt": list(range(48, 58)) * 10}
        self._served("token ids", "/v1/completions", ids, lambda a: a["usage"]["prompt_tokens"] == 100)
        if self._sglang:
            self._generate(text, count)
        self._many()
        self.front.moved = self._moved() - before
        if self._ours and not self._sglang:
            self.front.expect(self.front.moved >= HAND_OVERS, f"only {self.front.moved} hand-overs")

    def _generate(self, text: str, count: int) -> None:
        sampling = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        body = {"text": text, "sampling_params": sampling}
        self._served("generate", "/generate", body, lambda a: a["meta_info"]["completion_tokens"] == count)
        self._served("repeated prompt", "/generate", body, lambda a: a["meta_info"]["cached_tokens"] > 200)
        self._served(
            *("generate, streamed", "/generate", {**body, "stream": True}),
            lambda events: events[-1] == "[DONE]" and events[-2]["meta_info"]["completion_tokens"] == count,
        )
        self._served("list of texts", "/generate", {**body, "text": [text + "1", text + "2"]}, lambda a: len(a) == 2)
        ids = {"input_ids": [[49, 50, 51, 52], [53, 54, 55, 56]], "sampling_params": sampling}
        self._served("lists of token ids", "/generate", ids, lambda a: len(a) == 2)
        probable = {**body, "text": text + "L", "return_logprob": True, "logprob_start_len": 0}
        self._served("log probabilities", "/generate", probable, _has_logprobs)
        self._served(
            *("log probabilities, streamed", "/generate", {**probable, "text": text + "S", "stream": True}),
            lambda events: all(_has_logprobs(event) for event in events[:-1]),
        )

    def _many(self) -> None:
        bodies = [
            {"model": MODEL, "prompt": f"{n} {document('MANY', 300)}", "max_tokens": 16, "temperature": 0}
            for n in range(40)
        ]
        began = time.monotonic()
        answers = self._at_once(bodies)
        self.front.forty = round(max(at for _, at in answers) - began, 1)
        self._count("40 at once", answers)

    def _at_once(
        self, bodies: Sequence[Any], meanwhile: Callable[[], None] | None = None
    ) -> list[tuple[Answer, float]]:
        with ThreadPoolExecutor(len(bodies)) as threads:
            asked = [threads.submit(self._ask, "/v1/completions", body, 2 * PATIENCE) for body in bodies]
            if meanwhile:
                meanwhile()
            return [each.result() for each in asked]

    def _count(self, name: str, answers: Sequence[tuple[Answer, float]]) -> int:
        failed = sum(answer.status != 200 for answer, _ in answers)
        self.front.requests += len(answers)
        self.front.failed += failed
        if self._ours:
            self.front.expect(not failed, f"{name}: {[a.body[:200] for a, _ in answers if a.status != 200][:2]}")
        return failed

    def _moved(self) -> int:
        """Return the transfers of blocks so far (vLLM): decodes that pull, or the prefill that pushes, counts them."""
        if self._sglang:
            return 0
        return sum(int(_metric(engine, "vllm:nixl_xfer_time_seconds_count")) for engine in self._pair.engines)

    def _samples(self) -> None:
        """Two samples of one chat: whatever a router makes of it, it must answer."""
        message = {"role": "user", "content": document("SAMPLES", 200)}
        body = {"model": MODEL, "messages": [message], "max_tokens": 4, "temperature": 0.7, "n": 2}
        began = time.monotonic()
        answer, at = self._ask("/v1/chat/completions", body)
        took = at - began
        if answer.status == 200:
            self.front.samples = f"{len(answer.json()['choices'])} choices in {took:.1f} s"
        else:
            self.front.samples = f"{answer.status} in {took:.1f} s" if answer.status else f"no answer in {took:.0f} s"
        if self._ours:
            whole = answer.status == 200 and len(answer.json()["choices"]) == 2
            self.front.expect(whole or answer.status == 400, f"chat, n = 2: {answer.status} {answer.body[:300]!r}")

    # -- clients that leave ------------------------------------------------------------------------------

    def _client_waits(self) -> None:
        """Prefill is stopped; the client leaves while decode waits for it."""
        prefill = self._pair.prefill
        prefill.signal(signal.SIGSTOP)
        try:
            with self._client({"prompt": document("LEAVES", 300), "max_tokens": 4}):
                time.sleep(1.5)  # how long the client waits before it leaves
            time.sleep(1.0)  # how long decode is left alone with a prefill that is silent
        finally:
            prefill.signal(signal.SIGCONT)
        self._router.until_ready()

    def _client_streams(self) -> None:
        body = {"prompt": document("STREAM", 300), "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with self._client(body) as connection:
            heard = b""
            while heard.count(b"data:") < 3:
                more = connection.recv(65536)
                if not more:
                    raise CourseError(f"{self.front.name}: the stream ended: {heard[-300:]!r}")
                heard += more

    def _client(self, body: dict[str, Any]) -> socket.socket:
        """Send a completion; closing the connection is for the caller."""
        data = json.dumps({"model": MODEL, "temperature": 0, **body}).encode()
        host, port = self._router.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def _fields(self) -> None:
        """Send what only a router may set. An engine that dies of it is started again."""
        hostile: list[dict[str, Any]] = [
            *({"bootstrap_host": "127.0.0.1"}, {"bootstrap_port": 9}, {"bootstrap_room": 1}, {"rid": "another's"}),
            *({"routed_dp_rank": 3}, {"disagg_prefill_dp_rank": 3}, {"data_parallel_rank": 3}),
            {"kv_transfer_params": {"do_remote_prefill": True}},
        ]
        said = {}
        for fields in hostile:
            body = {"model": MODEL, "prompt": document("FIELDS", 100), "max_tokens": 2, **fields}
            said[next(iter(fields))] = self._ask("/v1/completions", body)[0].status
        time.sleep(2.0)
        dead = [engine for engine in self._pair.engines if not engine.alive()]
        refused = sum(status == 400 for status in said.values())
        self.front.fields = f"{refused} of {len(said)} refused" + (f", {len(dead)} engine ended" if dead else "")
        if self._ours:
            self.front.expect(not dead, f"ended by a client's fields: {dead}")
            self.front.expect(set(said.values()) <= {200, 400}, f"fields of the router: {said}")
        self._restart(dead)

    # -- kill -9 -----------------------------------------------------------------------------------------

    def _kill_decode(self) -> None:
        """One of two decodes dies with requests waiting there."""
        took, answers = self._kill(self._pair.decodes[0])
        self.front.decode_killed = took
        self.front.decode_lost = self._count("decode killed", answers) if self._ours else _failed(answers)
        self._settle("decode killed")
        self._restart([self._pair.decodes[0]])
        self._afterwards("decode is back")

    def _kill_prefill(self) -> None:
        """The only prefill dies with requests waiting: they must be answered soon, and leave nothing."""
        took, answers = self._kill(self._pair.prefill)
        self.front.prefill_killed, self.front.prefill_lost = took, _failed(answers)
        self._settle("prefill killed", HELD)
        self._restart([self._pair.prefill])
        self._afterwards("prefill is back")

    def _kill(self, engine: PairEngine) -> tuple[float, list[tuple[Answer, float]]]:
        """Stop an engine, send requests, kill it; return the seconds from then to the last answer, and the answers."""
        killed = 0.0

        def kill() -> None:
            nonlocal killed
            time.sleep(1.5)
            killed = time.monotonic()
            engine.kill()

        engine.signal(signal.SIGSTOP)
        prompts = [f"{n} {document('KILLED', 300)}" for n in range(4)]
        bodies = [{"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0} for prompt in prompts]
        answers = self._at_once(bodies, kill)
        took = round(max(0.0, max(at for _, at in answers) - killed), 1)
        if self._ours:
            self.front.expect(took < QUICK, f"{engine.place.name} killed: the last answer came {took} s later")
            statuses = {answer.status for answer, _ in answers}
            self.front.expect(statuses <= {200, 502, 503}, f"{engine.place.name} killed: {statuses}")
        return took, answers

    def _restart(self, engines: Sequence[PairEngine]) -> None:
        if engines:
            self._pair.restart(*engines)
            self._router.until_ready()

    def _afterwards(self, name: str) -> None:
        """Ask until a request is answered: for ours, the first one must be."""
        body = {"model": MODEL, "prompt": f"{name} {document('AGAIN', 200)}", "max_tokens": 4, "temperature": 0}
        deadline = time.monotonic() + BACK
        while self._ask("/v1/completions", body)[0].status != 200:
            self.front.expect(not self._ours, f"{name}: the first request failed")
            if time.monotonic() > deadline:
                print(f"      {name}, and no request is answered for {BACK:.0f} s", flush=True)
                return
            time.sleep(0.5)


def left_on(kind: PairKind, engine: PairEngine) -> int:
    """Return what an engine holds: tokens and queued requests (SGLang), or requests (vLLM)."""
    if kind is not SGLANG_PD:
        return int(_metric(engine, "vllm:num_requests_running") + _metric(engine, "vllm:num_requests_waiting"))
    load = call(engine.url, "GET", "/v1/loads?include=core,disagg").json()["loads"][0]
    queues = sum(count for name, count in load["disaggregation"].items() if name.endswith("_reqs"))
    return int(sum(load[name] for name in ALIVE) + queues)


def _metric(engine: PairEngine, name: str) -> float:
    lines = call(engine.url, "GET", "/metrics").body.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


def _events(answer: Answer) -> list[Any]:
    data = [line[6:] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def _has_logprobs(answer: Any) -> bool:
    about = answer["meta_info"]
    return len(about["input_token_logprobs"]) == about["prompt_tokens"] and bool(about["output_token_logprobs"])


def _failed(answers: Sequence[tuple[Answer, float]]) -> int:
    return sum(answer.status != 200 for answer, _ in answers)


# -- the process in the namespace ------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What the process in the namespace is told.

    python   the engines' interpreter, and `imports` what goes first on its path
    model    a Hugging Face folder
    folder   for logs and the result
    routers  interpreters by the name of the router; one that is missing is left out
    """

    kind: str
    python: str
    imports: list[str]
    model: str
    folder: str
    routers: dict[str, str]


def course(given: Given) -> list[Front]:
    """Run all checks behind each router; return what each did."""
    kind, folder = KINDS[given.kind], Path(given.folder)
    fronts = []
    began = time.monotonic()
    with RealPair(kind, given.python, list(map(Path, given.imports)), Path(given.model), folder, DECODES) as pair:
        print(f"    three engines healthy after {time.monotonic() - began:.0f} s", flush=True)
        for router_kind in FRONTS[kind.name]:
            if router_kind.name not in given.routers:
                continue
            print(f"    {router_kind.name}", flush=True)
            try:
                with FrontRouter(router_kind, Path(given.routers[router_kind.name]), pair, folder) as router:
                    each = PairCourse(pair, router)
                    fronts.append(each.front)
                    each.run()
            except CourseError as error:
                if router_kind.name == OURS:
                    raise
                print(f"    {error}", flush=True)
            pair.mend()
    return fronts


def in_namespace(given: Given) -> list[Front]:
    """Run `course` in a process that has a network of its own. Raises: CourseError."""
    told = Path(given.folder) / TOLD
    command = [sys.executable, "-m", "scripts.real_engines.pair_course", json.dumps(given._asdict())]
    done = subprocess.run(command, check=False)
    if done.returncode or not told.exists():
        raise CourseError(f"the checks of {given.kind} ended with status {done.returncode}")
    return [Front(**front) for front in json.loads(told.read_text())]


def main() -> int:
    given = Given(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `finally` ends the engines
    try:
        enter_namespace()
        fronts = course(given)
    except (CourseError, SetupError) as error:
        print(f"    {error}", file=sys.stderr)
        return 1
    (Path(given.folder) / TOLD).write_text(json.dumps([asdict(front) for front in fronts]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
