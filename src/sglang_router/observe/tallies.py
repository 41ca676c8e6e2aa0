"""What is counted while requests run: plain integers in plain objects, so that counting costs a microsecond.

    Finished  ->  Series of the request's kind  kind: method, path, model, streaming, status, code
              ->  Tally of the leg's worker     legs by outcome; it also leads to the worker's decisions

A request is counted once, in one `Series`. Each metric family about requests is a sum over series, computed at the
scrape. The number of kinds is bounded, because clients choose the labels: `Labels` folds unknown labels into "other".

A worker's `Tally` lives as long as the worker. When the worker is removed, its tally is added to the tally of the
removed workers, so that totals without a worker label never decrease.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from sglang_router.routing.decisions import Decisions
from sglang_router.routing.events import Answered
from sglang_router.routing.usage import Usage

OTHER: Final = "other"
MOST_MODELS: Final = 100
METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


SeriesKind = tuple[str, str, str, bool, int, str]
"""Method, path, model, streaming, status, error code."""


class Histogram:
    """Observations by bucket, not cumulative; the last bucket has no upper bound. `sum` in seconds."""

    __slots__ = ("counts", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0

    def add(self, other: Histogram) -> None:
        """Add another histogram with the same bounds."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Series:
    """Requests of one kind. `endpoint` is "" for the control plane. The labels are bounded.

    received   bytes of request bodies
    sent       bytes of answers
    legs       legs sent to workers, retries included
    exhausted  requests whose last outcome is retryable, but no retry or no worker was left
    gone       requests whose client left before the end of the answer
    resumed    streams that another worker continued
    """

    __slots__ = (
        *("method", "path", "endpoint", "model", "streaming", "status", "code"),
        *("duration", "first_byte", "received", "sent"),
        *("legs", "retries", "exhausted", "gone", "resumed"),
    )

    def __init__(self, kind: SeriesKind, endpoint: str, buckets: int) -> None:
        self.method, self.path, self.model, self.streaming, self.status, self.code = kind
        self.endpoint = endpoint
        self.duration = Histogram(buckets)
        self.first_byte = Histogram(buckets)
        self.received = self.sent = 0
        self.legs = self.retries = self.exhausted = 0
        self.gone = self.resumed = 0


class TokenCounts:
    """Tokens of the answers of one worker for one model, as far as its engine tells.

    prompt, cached, completion  see `routing.usage.Usage`
    predicted                   those that the router believed to be cached, where `cached` is told
    misses                      answers with far fewer cached tokens than predicted
    """

    __slots__ = ("cached", "completion", "misses", "predicted", "prompt")

    def __init__(self) -> None:
        self.prompt = self.cached = self.completion = self.predicted = self.misses = 0

    @property
    def any(self) -> bool:
        """Whether an engine has told of tokens."""
        return bool(self.prompt or self.cached or self.completion)

    def add(self, usage: Usage) -> None:
        """Count an answer."""
        prompt, cached, completion = usage.prompt, usage.cached, usage.completion
        if prompt > 0:
            self.prompt += prompt
        if cached > 0:
            self.cached += cached
        if completion > 0:
            self.completion += completion
        if usage.predicted > 0:
            self.predicted += usage.predicted
            self.misses += usage.missed

    def merge(self, other: TokenCounts) -> None:
        """Add what another worker's engine told."""
        self.prompt += other.prompt
        self.cached += other.cached
        self.completion += other.completion
        self.predicted += other.predicted
        self.misses += other.misses


class ModelAnswers:
    """Answers of one worker for one model: their tokens, and the times of those that were served.

    duration     from the whole request to the last byte of the answer
    first_token  from the whole request to the first event; of streams
    inter_token  mean time between two tokens of a stream whose engine told how many there were
    """

    __slots__ = ("duration", "first_token", "inter_token", "tokens")

    def __init__(self, buckets: int) -> None:
        self.tokens = TokenCounts()
        self.duration = Histogram(buckets)
        self.first_token = Histogram(buckets)
        self.inter_token = Histogram(buckets)


class Tally:
    """What was counted for one worker, or for all removed workers of one role (`name` is "" then).

    decisions    those for the worker, which the router counts
    answers      by the label of the model
    ejections    how often it was ejected
    outcomes     legs, by label of their Outcome
    transitions  moves of the circuit breaker, by old and new state
    """

    __slots__ = ("answers", "decisions", "ejections", "name", "outcomes", "role", "transitions")

    def __init__(self, name: str, role: str, decisions: Decisions) -> None:
        self.name = name
        self.role = role
        self.decisions = decisions
        self.outcomes: dict[str, int] = {}
        self.transitions: dict[tuple[str, str], int] = {}
        self.answers: dict[str, ModelAnswers] = {}
        self.ejections = 0

    def ended(self, outcome: str, legs: int = 1) -> None:
        """Count legs that ended, by the label of their outcome."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + legs

    def moved(self, old: str, new: str) -> None:
        """Count a move of the circuit breaker."""
        self.transitions[old, new] = self.transitions.get((old, new), 0) + 1

    def add(self, other: Tally) -> None:
        """Add all of another tally except its transitions, times and ejections: nothing sums them."""
        self.decisions.add(other.decisions)
        for model, answers in other.answers.items():
            mine = self.answers.setdefault(model, ModelAnswers(len(answers.duration.counts)))
            mine.tokens.merge(answers.tokens)
        for outcome, legs in other.outcomes.items():
            self.ended(outcome, legs)


class ClientTally:
    """What the clients of one name have used.

    requests                    relayed or refused
    prompt, cached, completion  tokens, as far as engines tell, see `routing.usage.Usage`
    refused                     requests that the router itself answered with an error, by its code
    """

    __slots__ = ("cached", "completion", "prompt", "refused", "requests")

    def __init__(self) -> None:
        self.requests = self.prompt = self.cached = self.completion = 0
        self.refused: dict[str, int] = {}

    def add(self, answer: Answered) -> None:
        """Count a request."""
        self.requests += 1
        code, usage = answer.code, answer.usage
        if code:
            self.refused[code] = self.refused.get(code, 0) + 1
        if usage is not None:
            self.prompt += max(usage.prompt, 0)
            self.cached += max(usage.cached, 0)
            self.completion += max(usage.completion, 0)


class Labels:
    """Bounds the labels that clients choose.

    `paths` are the paths the router serves, exact or with parameters as in "/workers/{id}". `models` are the names that
    workers announce now, by their JSON text, and `aliases` what an operator calls models: only these become labels, and
    at most `MOST_MODELS` in the process's life.
    A label that was given once stays, so that its counters go on when the model comes back.
    """

    def __init__(
        self, paths: Iterable[str], models: Mapping[str, str], aliases: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        paths = tuple(paths)
        self._announced = models
        self._aliases = aliases
        self._exact = frozenset(path for path in paths if "{" not in path)
        self._patterns = [(_pattern(path), path) for path in paths if "{" in path]
        self._models: dict[str, str] = {"": "unknown"}

    def method(self, method: str) -> str:
        """Return the label of a method."""
        return method if method in METHODS else OTHER

    def path(self, path: str) -> str:
        """Return the path, the pattern it matches, or "other"."""
        if path in self._exact:
            return path
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), OTHER)

    def model(self, model: str) -> str:
        """Return the label of a model. `model` is the JSON text of the request, "" when the request names no model."""
        label = self._models.get(model)
        if label is None:
            label = self._announced.get(model, OTHER)
            if label == OTHER and self._aliases:
                label = self._aliases.get(model, OTHER)
            if label == OTHER or len(self._models) > MOST_MODELS:
                return OTHER
            self._models[model] = label
        return label


def _pattern(path: str) -> re.Pattern[str]:
    """Compile "/workers/{id}" or "/files/{path:path}"; only the second kind of parameter matches slashes."""
    parts = re.split(r"\{(\w+(?::\w+)?)\}", path)
    fields = [".+" if name.endswith(":path") else "[^/]+" for name in parts[1::2]]
    texts = [re.escape(text) for text in parts[::2]]
    return re.compile("".join(text + field for text, field in zip(texts, [*fields, ""], strict=True)))
