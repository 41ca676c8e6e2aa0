"""The checks of every engine, in two runs of launch_server with two replicas of it.

    first run, a tiny model                                  second run, a model that can answer
      answers      openai client, plain HTTP, streams          answer       the capital of France
      cache        predicted = reported, request by request    scaling      1 -> 2 under load -> 1
      flush        the same text is new again                  kill -9 of the launcher: nothing is left
      kill -9      of a replica under load; it comes back
      rolling      restart of all, under load
      Ctrl-C       under load; nothing is left

A third, of engines that send traces, with one replica of a tiny model: their spans are below the router's.

`cache` compares predicted and reported tokens; `load` counts the outcomes of requests under load; `traces` compares
spans.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
from openai.types.completion_usage import CompletionUsage
from scripts.real_engines.cache import Cache, conversation
from scripts.real_engines.engines import Engine
from scripts.real_engines.launched import Launched
from scripts.real_engines.load import Fate, Load
from scripts.real_engines.results import Results
from scripts.real_engines.text import document
from scripts.real_engines.traces import Joined, Traces

from collectors import collector

REPLICAS = 2
STARTS_WITHIN = 600.0
"""Seconds. Two engines start at once on two cores that other programs use as well."""
ENDS_WITHIN = 40.0


class Course:
    """All checks of one engine. `say` prints the progress."""

    def __init__(self, engine: Engine, python: str, folder: Path, results: Results) -> None:
        self._engine = engine
        self._python = python
        self._folder = folder
        self._results = results
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"  {time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def _launch(self, name: str, model: Path, *flags: str) -> Launched:
        engine = self._engine
        arguments = ["--backend", engine.name, "--model-path", str(model), "--router-dp-worker-base-port", "31000"]
        if engine.folder:
            arguments += ["--engine-python", self._python]
        arguments += [*flags, *(flag.format(name=name) for flag in engine.flags)]
        return Launched(self._folder / name, arguments, engine.environ)

    # -- the first run --------------------------------------------------------------------------------------

    def first(self, model: Path) -> None:
        run = self._launch("tiny", model, "--dp-size", str(REPLICAS), "--router-slow-start-secs", "1")
        try:
            self._start(run)
            self._answers(run)
            self._cache(run)
            if self._engine.flush:
                self._flush(run)
            self._kill(run)
            self._rolling(run)
            self._interrupt(run)
        finally:
            run.end()

    def _start(self, run: Launched, replicas: int = REPLICAS) -> None:
        self.say(f"launch_server starts {replicas} x {self._engine.name}")
        run.until(lambda: run.healthy() > 0, STARTS_WITHIN, "no replica is healthy")
        self.say("the first replica is healthy")
        run.until(lambda: run.healthy() == replicas, STARTS_WITHIN, "not all replicas are healthy")
        self._results.start = self._results.start or time.monotonic() - run.began
        self.say("all are")
        self._results.expect(not run.open_ports(), f"ports open to other machines: {', '.join(run.open_ports())}")

    def _answers(self, run: Launched) -> None:
        """Check each kind of answer, with the clients that people use."""
        self.say("answers")
        expect = self._results.expect
        client = openai.OpenAI(base_url=f"http://{run.address}/v1", api_key="none", max_retries=0, timeout=120)
        expect("tiny" in {model.id for model in client.models.list()}, "GET /v1/models does not name the model")
        chat: Any = {"model": "tiny", "messages": [{"role": "user", "content": document("CHAT", 200)}]}
        text: Any = {"model": "tiny", "prompt": document("COMPLETION", 200)}
        more: Any = {"max_tokens": 8, "temperature": 0}
        usage: Any = {"stream": True, "stream_options": {"include_usage": True}}

        message = client.chat.completions.create(**chat, **more)
        expect(bool(message.choices[0].message.content), "chat: no content")
        self._counted("chat", message.usage, 8)
        parts = list(client.chat.completions.create(**chat, **more, **usage))
        said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        expect(said == message.choices[0].message.content, "chat: the stream says something else")
        self._counted("chat stream", parts[-1].usage, 8)

        completion = client.completions.create(**text, **more)
        self._counted("completion", completion.usage, 8)
        pieces = list(client.completions.create(**text, **more, **usage))
        said = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        expect(said == completion.choices[0].text != "", "completion: the stream says something else")
        self._counted("completion stream", pieces[-1].usage, 8)
        self._results.requests += 4
        if self._engine.generate:
            self._generate(run)

    def _counted(self, what: str, usage: CompletionUsage | None, tokens: int) -> None:
        found = usage.completion_tokens if usage is not None else 0
        self._results.expect(found == tokens, f"{what}: {found} tokens instead of {tokens}")

    def _generate(self, run: Launched) -> None:
        """Check SGLang's own endpoint; the last event of its stream contains the whole text."""
        body = {"text": document("GENERATE", 200), "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
        whole = run.ask("POST", "/generate", body).json()
        self._results.expect(whole["meta_info"]["completion_tokens"] == 8, "/generate: not 8 tokens")
        stream = run.ask("POST", "/generate", body | {"stream": True}).body.decode()
        self._results.expect(f'"text":"{whole["text"]}"' in stream, "/generate: the stream says something else")
        self._results.expect(stream.rstrip().endswith("data: [DONE]"), "/generate: the stream has no end")
        self._results.requests += 2

    # -- predicted and reported -----------------------------------------------------------------------------

    def _cache(self, run: Launched) -> None:
        """Ask questions about four documents in turn; compare each prediction with the engine's report."""
        self.say("cached tokens: predicted and reported")
        cache = Cache(run, self._engine, self._results)
        homes: dict[str, str] = {}
        for name, prompt in conversation(self._engine):
            worker = cache.send(name, prompt)
            home = homes.setdefault(name.partition(" ")[0], worker)
            self._results.expect(worker == home, f"{name} went to {worker}, its document is at {home}")
        self._results.expect(len(set(homes.values())) == REPLICAS, "all documents went to one replica")
        cache.read_log()
        self.say(f"predicted {self._results.predicted}, reported {self._results.reported}")

    def _flush(self, run: Launched) -> None:
        self.say("flush")
        answer = run.ask("POST", "/flush_cache")
        self._results.expect(answer.status == 200, f"/flush_cache: {answer.status} {answer.body[:200]!r}")
        name, prompt = next(conversation(self._engine))
        before = self._results.reported
        Cache(run, self._engine, self._results).send(f"{name} after the flush", prompt)
        self._results.expect(self._results.reported == before, "something is cached after the flush")

    # -- under load -----------------------------------------------------------------------------------------

    def _kill(self, run: Launched) -> None:
        """Kill a replica (kill -9) under load."""
        self.say("kill -9 of a replica under load")
        load = self._load(run, "tiny")
        victim: dict[str, Any] = {}

        def busy() -> bool:
            victim.update(run.workers()[0])
            return bool(victim["load"] > 1)

        run.until(busy, 60, "the load does not reach the first replica")
        began = time.monotonic()
        os.kill(victim["replica"]["pid"], signal.SIGKILL)
        run.until(lambda: run.healthy() < REPLICAS, 10, "the dead replica is not taken out")
        run.until(lambda: run.healthy() == REPLICAS, STARTS_WITHIN, "the dead replica does not come back")
        self._results.back = time.monotonic() - began
        again = run.workers()[0]["replica"]  # the order does not change
        self._results.expect(again["restarts"] == 1, f"restarts: {again['restarts']}, not 1")
        self._finish(load, cuts=True)
        self.say(f"it came back after {self._results.back:.1f} s; streams cut: {self._results.cut}")

    def _load(self, run: Launched, name: str, threads: int = 4) -> Load:
        return Load(run.address, name, self._engine.lengths, threads)

    def _finish(self, load: Load, *, cuts: bool) -> None:
        fates = load.join()
        self._results.count(fates)
        self._results.expect(fates[Fate.ANSWERED] > 0, "nothing was answered")
        lost = fates[Fate.FAILED] + (0 if cuts else fates[Fate.CUT])
        reasons = ", ".join(f"{count} x {reason}" for reason, count in load.reasons.items())
        self._results.expect(not lost, f"{lost} of {fates.total()} requests were lost: {reasons}")

    def _rolling(self, run: Launched) -> None:
        """Check that POST /restart_workers under load loses no request and no stream."""
        self.say("rolling restart under load")
        pids = [worker["replica"]["pid"] for worker in run.workers()]
        load = self._load(run, "tiny")
        began = time.monotonic()
        answer = run.ask("POST", "/restart_workers")
        self._results.expect(answer.status == 202, f"/restart_workers: {answer.status} {answer.body[:200]!r}")
        told: dict[str, Any] = {}

        def over() -> bool:
            told.update(run.ask("GET", "/restart_workers").json())
            return bool(told["state"] != "running")

        run.until(over, 2 * STARTS_WITHIN, "the rolling restart does not end")
        self._results.rolling = time.monotonic() - began
        self._finish(load, cuts=False)
        self._results.expect(told["state"] == "done", f"the rolling restart ended so: {told}")
        now = [worker["replica"]["pid"] for worker in run.workers()]
        self._results.expect(not set(pids) & set(now), "not all replicas are new processes")
        self.say(f"took {self._results.rolling:.1f} s")

    def _interrupt(self, run: Launched) -> None:
        """Check that Ctrl-C finishes the requests in flight and then ends all processes."""
        self.say("Ctrl-C under load")
        load = self._load(run, "tiny")
        run.until(lambda: any(worker["load"] for worker in run.workers()), 30, "the load does not reach the router")
        load.stop()
        # A connection that the router has not taken yet when it stops to listen is refused: that is no lost request.
        run.until(
            lambda: sum(worker["load"] for worker in run.workers()) == load.in_flight, 30, "a request does not arrive"
        )
        began = time.monotonic()
        run.interrupt()
        self._finish(load, cuts=False)
        status = run.process.wait(ENDS_WITHIN)
        self._results.end = time.monotonic() - began
        self._results.expect(status == 0, f"exit status {status} after Ctrl-C\n{run.tails()}")
        self._nothing_left(run)
        self.say(f"ended after {self._results.end:.1f} s")

    def _nothing_left(self, run: Launched, within: float = 0.0) -> None:
        deadline = time.monotonic() + within
        while (left := run.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._results.expect(not left, f"still running: {', '.join(str(process.pid) for process in left)}")

    # -- the second run -------------------------------------------------------------------------------------

    def second(self, name: str, model: Path) -> None:
        """Check scaling from one replica to two and back to one. Only a real model is asked a question."""
        scaling = ["--router-autoscale", f"1:{REPLICAS}", "--router-autoscale-target-load", "2"]
        scaling += ["--router-autoscale-up-cooldown-secs", "1", "--router-autoscale-down-cooldown-secs", "3"]
        run = self._launch(name, model, "--dp-size", "1", *scaling)
        try:
            self._start(run, 1)
            if name != "tiny":
                self._question(run, name)
            self._scaling(run, name)
            self.say("kill -9 of the launcher")
            run.kill()
            self._nothing_left(run, within=10)
        finally:
            run.end()

    def _question(self, run: Launched, name: str) -> None:
        client = openai.OpenAI(base_url=f"http://{run.address}/v1", api_key="none", max_retries=0, timeout=120)
        question: Any = [{"role": "system", "content": "You are a helpful assistant."}]
        question += [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=name, messages=question, max_tokens=24, temperature=0)
        said = answer.choices[0].message.content or ""
        self.say(f"What is the capital of France? {said.strip()!r}")
        self._results.expect("Paris" in said, f"it says {said!r}")
        self._results.requests += 1

    def _scaling(self, run: Launched, name: str) -> None:
        self.say("scaling: 1 -> 2 under load -> 1")
        load = self._load(run, name)
        run.until(lambda: run.healthy() == REPLICAS, STARTS_WITHIN, "no second replica under load")
        self.say("two replicas")
        self._finish(load, cuts=False)
        load = self._load(run, name, threads=1)  # a little load, so that a lost request would be noticed
        run.until(lambda: len(run.workers()) == 1, 120, "the second replica is not stopped")
        self.say("one replica")
        self._finish(load, cuts=False)

    # -- the third run --------------------------------------------------------------------------------------

    def traced(self, model: Path) -> Joined:
        """Check that the spans of one replica join the router's. No trace that begins at the router is recorded."""
        with collector("grpc") as got:
            router = ["--router-policy", "round_robin", "--router-enable-trace", "--router-trace-sample-ratio", "0"]
            router += ["--router-otlp-traces-endpoint", got.endpoint]
            engine = [flag.format(endpoint=got.endpoint) for flag in self._engine.tracing]
            run = self._launch("tiny", model, "--dp-size", "1", *router, *engine)
            try:
                self._start(run, 1)
                self.say("traces")
                return Traces(run, got, self._results).check()
            finally:
                run.end()
