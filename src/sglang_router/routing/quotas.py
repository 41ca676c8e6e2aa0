"""What single clients and single models may have of the router: rates, concurrency, tokens, models, priorities.

    admit(tag, facts, now)        count a new request for its client and its model, or refuse it: 429, 403
    finished(event)               it ended: it is in flight no more, and its tokens are counted
    priority(tag, facts)          how soon it begins when it is queued
    use_clients, use_models       other limits count from now on; what is in flight stays counted

    limit                      counted                       refused with
    requests_per_second        when a request comes          requests_limited
    max_concurrent_requests    from then until its end       concurrency_limited
    tokens_per_minute          when its answer is complete   tokens_limited

A request over one of these limits is refused at once and never queued: else one client could fill the queue for all.
All limits of a request are looked at before it is counted for any of them. Tokens are known afterwards, so requests in
flight can spend more than there is; the client waits longer then.

A client is the name of its key: two keys of one name share the limits. Names and models come from the operator's files,
so clients cannot add state; of requests it keeps those in flight.

Pure: time is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from sglang_router.errors import ConcurrencyLimited, ModelNotAllowed, Overload, RequestsLimited, TokensLimited
from sglang_router.routing.events import Finished, Listener
from sglang_router.routing.facts import Facts
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.rules import NO_LIMITS, ClientRules, LimitRules, ModelRules
from sglang_router.routing.token_bucket import TokenBucket

_NO_ALIASES: Final[Mapping[bytes, bytes]] = MappingProxyType({})
_SOON: Final = 1.0
"""Retry-After in seconds for a client that has too many requests in flight: when one ends, nobody knows."""


class Meter:
    """What one client or model has used.

    name     in messages: "the key alice"
    rules    its limits
    running  its requests in flight
    """

    __slots__ = ("_requests", "_tokens", "name", "rules", "running")

    def __init__(self, name: str) -> None:
        self.name = name
        self.running = 0
        self.rules = NO_LIMITS
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None

    def __repr__(self) -> str:
        return f"<Meter of {self.name}: {self.running} running>"

    def use(self, rules: LimitRules) -> None:
        """Change the limits. Those that stay the same go on as they are."""
        old, self.rules = self.rules, rules
        rate, tokens = rules.requests_per_second, rules.tokens_per_minute
        if (rate, rules.burst) != (old.requests_per_second, old.burst):
            self._requests = None if rate is None else TokenBucket(rate, rules.burst)
        if tokens != old.tokens_per_minute:
            self._tokens = None if tokens is None else TokenBucket(tokens / 60.0, tokens)

    def refusal(self, now: float) -> Overload | None:
        """Return why one more request is too many; None when it is not."""
        rules, name = self.rules, self.name
        if rules.max_concurrent is not None and self.running >= rules.max_concurrent:
            text = f"There are {self.running} requests in flight of {name}, and it may have {rules.max_concurrent}."
            return ConcurrencyLimited(f"{text} Wait until one ends.", retry_after=_SOON)
        if self._requests is not None and (missing := self._requests.missing(now)):
            text = f"More requests come of {name} than {rules.requests_per_second:g} per second. Send fewer."
            return RequestsLimited(text, retry_after=missing)
        if self._tokens is not None and (missing := self._tokens.missing(now)):
            text = f"The tokens of {name} are used up: it has {rules.tokens_per_minute:g} per minute. Try again later."
            return TokensLimited(text, retry_after=missing)
        return None

    def begin(self, now: float) -> None:
        """Count a request."""
        self.running += 1
        if self._requests is not None:
            self._requests.spend(1.0, now)

    def end(self, tokens: int, now: float) -> None:
        """Count the end of a request, and the tokens of its prompt and its answer."""
        self.running -= 1
        if self._tokens is not None and tokens > 0:
            self._tokens.spend(float(tokens), now)


class Quotas(Listener):
    """See the module. It hears Finished.

    on            there are limits of clients or models: without, `admit` need not be called
    max_priority  highest priority that a client may ask for if its key does not say
    """

    def __init__(self, max_priority: int = 0) -> None:
        self.on = False
        self.max_priority = max_priority
        self._clients: dict[str, tuple[ClientRules, Meter]] = {}
        self._models: dict[bytes, tuple[ModelRules, Meter]] = {}
        self._held: dict[int, tuple[Meter, ...]] = {}  # of requests in flight, by their number

    def __repr__(self) -> str:
        return f"<Quotas of {len(self._clients)} clients and {len(self._models)} models, {len(self._held)} in flight>"

    @property
    def running(self) -> int:
        """Number of requests in flight that are counted for somebody."""
        return len(self._held)

    def use_clients(self, rules: Mapping[str, ClientRules]) -> None:
        """Let these rules of clients count from now on, and no others."""
        known, self._clients = self._clients, {}
        for name, each in rules.items():
            meter = known[name][1] if name in known else Meter(f"the key {name}")
            meter.use(each.limits)
            self._clients[name] = (each, meter)
        self.on = bool(self._clients or self._models)

    def use_models(self, rules: Mapping[bytes, ModelRules], aliases: Mapping[bytes, bytes] = _NO_ALIASES) -> None:
        """Let these rules of models count from now on, and no others.

        rules    by the JSON text of their names
        aliases  other names of models, likewise: they share the limits
        """
        known, self._models = self._models, {}
        for name, each in rules.items():
            meter = known[name][1] if name in known else Meter(f"the model {name.decode()}")
            meter.use(each.limits)
            self._models[name] = (each, meter)
        self._models |= {alias: self._models[name] for alias, name in aliases.items() if name in self._models}
        self.on = bool(self._clients or self._models)

    def admit(self, tag: RequestTag, facts: Facts, now: float) -> None:
        """Count a new request. Its Finished must follow, also when it is refused later.

        Raises: Overload (429) with `retry_after`, ModelNotAllowed (403).
        """
        client, model = self._clients.get(tag.client), self._models.get(facts.model)
        held: tuple[Meter, ...] = ()
        if client is not None:
            allowed = client[0].models
            if allowed is not None and facts.model not in allowed and not facts.endpoint.about:
                raise ModelNotAllowed(param="model")
            held = (client[1],)
        if model is not None:
            held = (*held, model[1])
        for meter in held:
            if (refusal := meter.refusal(now)) is not None:
                raise refusal
        if held:
            for meter in held:
                meter.begin(now)
            self._held[tag.number] = held

    def finished(self, event: Finished) -> None:
        """Count the end of a request."""
        held = self._held.pop(event.tag.number, None)
        if held is not None:
            usage, now = event.answer.usage, event.tag.start + event.answer.duration
            tokens = 0 if usage is None else max(usage.prompt, 0) + max(usage.completion, 0)
            for meter in held:
                meter.end(tokens, now)

    def priority(self, tag: RequestTag, facts: Facts) -> int:
        """Return the priority of a request: what its client asks for, else that of its key, else that of its model,
        else 0; as far as its key allows it."""
        asked = tag.named[5]
        client, model = self._clients.get(tag.client), self._models.get(facts.model)
        own = 0 if model is None else model[0].priority
        most = max(self.max_priority, own)
        if client is not None:
            rules = client[0]
            own = own if rules.priority is None else rules.priority
            most = max(most, own) if rules.max_priority is None else rules.max_priority
        return min(own if asked is None else asked, most)
