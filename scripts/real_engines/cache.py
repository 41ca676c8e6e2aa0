"""Compare, for each request, the cached tokens that the router predicts with those that the engine reports.

    the router    matched bytes: the increase of its metrics; worker, branch, share: its access log
    the engine    cached tokens in the answer's usage

No other request runs meanwhile, and characters are tokens (see `text`). So the bytes give the number of tokens that the
worker should find, and each engine's rule (`Engine.reports`) gives the exact number that it must report.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from scripts.real_engines.engines import Engine
from scripts.real_engines.launched import Answer, CourseError, Launched
from scripts.real_engines.results import Results
from scripts.real_engines.text import CHAT_HEAD, document

MATCHED, TOTAL = "sgl_router_prefix_matched_bytes_total", "sgl_router_prefix_bytes_total"
THRESHOLD = 0.5
"""The router's default for --cache-threshold."""


class Prompt(NamedTuple):
    """One request. `head` is the number of tokens before its text."""

    path: str
    body: dict[str, Any]
    head: int
    text: str


class Told(NamedTuple):
    """The facts of a request from the metrics; its line in the access log must agree."""

    name: str
    request_id: str
    worker: str
    percent: int
    branch: str


class Cache:
    """Sends requests one after the other and compares. The sums and what is wrong go to `results`."""

    def __init__(self, run: Launched, engine: Engine, results: Results) -> None:
        self._run = run
        self._engine = engine
        self._results = results
        self._told: list[Told] = []
        self._counted = _counted(run)

    def send(self, name: str, prompt: Prompt) -> str:
        """Send one request; return the worker that answered it."""
        answer = self._run.ask("POST", prompt.path, prompt.body)
        if answer.status != 200:
            raise CourseError(f"{name}: {answer.status} {answer.body[:300]!r}")
        worker, matched, total = self._metered()
        tokens, reported = _usage(answer)
        self._results.requests += 1
        self._results.expect(tokens >= len(prompt.text) + prompt.head, f"{name}: {tokens} prompt tokens?")
        # the opening quote is matched as well, but it is not a token
        shared = tokens if matched == total else prompt.head + matched - 1 if matched else 0
        branch = "hit" if matched > THRESHOLD * total else "miss"
        self._compare(name, self._engine.reports(shared, tokens), reported, branch)
        self._told.append(Told(name, answer.headers["x-request-id"], worker, matched * 100 // total, branch))
        return worker

    def _metered(self) -> tuple[str, int, int]:
        """Return the worker of the last request, the bytes predicted as cached, and all bytes."""
        before, self._counted = self._counted, _counted(self._run)
        for worker, (matched, total) in self._counted.items():
            had, of = before.get(worker, (0, 0))
            if total > of:
                return worker, matched - had, total - of
        raise CourseError("the metrics do not know of the last request")

    def _compare(self, name: str, predicted: int, reported: int, branch: str) -> None:
        if self._engine.slots and branch == "miss":  # any slot may have processed it
            self._results.expect(reported <= predicted, f"{name}: {reported} cached tokens, {predicted} at most")
            return
        self._results.expect(reported == predicted, f"{name}: {reported} cached tokens, {predicted} predicted")
        self._results.predicted += predicted
        self._results.reported += reported

    def read_log(self) -> None:
        """Compare the access log with the facts from the metrics."""
        lines: dict[str, dict[str, Any]] = {}

        def all_written() -> bool:
            lines.update((line["id"], line) for line in self._run.records() if "id" in line)
            return all(told.request_id in lines for told in self._told)

        self._run.until(all_written, 10, "not all requests are in the log")
        for told in self._told:
            line = lines[told.request_id]
            found = (line["worker"], line["matched"], line["branch"])
            metrics = (told.worker, told.percent, told.branch)
            self._results.expect(found == metrics, f"{told.name}: log {found}, metrics {metrics}")


def conversation(engine: Engine) -> Iterator[tuple[str, Prompt]]:
    """Return the requests of the cache test, each with its name: document, then step."""
    documents = {str(n): f"{n}0 " + document(f"DOCUMENT {n}", 700) for n in range(4)}
    one, two, three = (document(f"QUESTION {n}", 200 + 40 * n) for n in range(3))
    steps = {"first": one, "again": one, "other question": two, "and again": two, "longer": two + three}
    if not engine.slots:
        steps |= {"back to the first": one, "back to the longer": two + three}
    for step, question in steps.items():
        for name, text in documents.items():
            yield f"{name} {step}", _completion(text + question)
    for step, question in steps.items():
        for name, text in documents.items():
            yield f"chat{name} {step}", _chat("9" + text + question)
    if engine.generate:
        for step, question in steps.items():
            yield f"generate {step}", _generation("80 " + documents["0"] + question)


def _completion(text: str) -> Prompt:
    return Prompt("/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": 4, "temperature": 0}, 0, text)


def _chat(text: str) -> Prompt:
    messages = [{"role": "user", "content": text}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0}
    return Prompt("/v1/chat/completions", body, CHAT_HEAD, text)


def _generation(text: str) -> Prompt:
    return Prompt("/generate", {"text": text, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}, 0, text)


def _usage(answer: Answer) -> tuple[int, int]:
    """Return the prompt tokens, and how many of them were cached."""
    said = answer.json()
    if "meta_info" in said:
        return said["meta_info"]["prompt_tokens"], said["meta_info"]["cached_tokens"]
    usage = said["usage"]
    return usage["prompt_tokens"], (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _counted(run: Launched) -> dict[str, tuple[int, int]]:
    """Return, for each worker, the bytes of routing text predicted as cached, and all bytes."""
    found: dict[str, dict[str, int]] = {MATCHED: {}, TOTAL: {}}
    text = run.ask("GET", "/metrics").body.decode()
    ours = "".join(line + "\n" for line in text.splitlines() if "sgl_router_prefix_" in line)
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            if sample.name in found:
                found[sample.name][sample.labels["worker"]] = int(sample.value)
    return {worker: (found[MATCHED].get(worker, 0), total) for worker, total in found[TOTAL].items()}
