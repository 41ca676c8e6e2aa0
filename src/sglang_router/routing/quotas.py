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
flight can spend more than there is; the client waits longer then. Where nobody tells them, because the client left or
did not ask for them, they are estimated by bytes: else to leave just before the end would cost nothing.

Several routers that share what they know count together (`routing.shared.spending`).

A client is the name of its key: two keys of one name share the limits. A client with a token of the identity provider
is `jwt:` and its subject; those that no rule names have the same rules, each with a meter of its own. Such meters are
bounded: the one that was used longest ago, and has nothing in flight, makes room. All other names, and models, come
from the operator's files, so clients cannot add state; of requests it keeps those in flight.

Pure: time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from sglang_router.errors import ConcurrencyLimited, ModelNotAllowed, Overload, RequestsLimited, TokensLimited
from sglang_router.routing.events import Finished, Listener
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import RequestTag
from sglang_router.routing.rules import NO_LIMITS, ClientRules, LimitRules, ModelRules
from sglang_router.routing.token_bucket import TokenBucket

_NO_ALIASES: Final[Mapping[bytes, bytes]] = MappingProxyType({})
_SOON: Final = 1.0
"""Retry-After in seconds for a client that has too many requests in flight: when one ends, nobody knows."""
TOKEN: Final = "jwt:"  # noqa: S105 - what the name of a client begins with
"""Begins the name of a client with a token of the identity provider; the name of no key does."""
_LOOKS: Final = 8
"""Meters that are looked at when one must make room."""
_SERVED: Final = Outcome.SERVED
_GONE: Final = Outcome.GONE
_REQUESTS: Final = b"requests"
_TOKENS: Final = b"tokens"
_FIELDS: Final = (
    b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %.3fs\r\n"  # as OpenAI's
)
_ROUNDING: Final = 1e-6
_LONGEST: Final = 3600.0
"""Seconds for which a client is refused at most by the word of other routers: one of them may be wrong."""
_TEXT: Final = 4
"""Bytes of a text that count as one token, where nobody tells how many there are."""
_MS_BITS: Final = 32
_MOST_MS: Final = (1 << _MS_BITS) - 1
_EVENT: Final = 200
"""Bytes of a stream that count as one token: an event with its names and ids."""


class Meter:
    """What one client or model has used.

    name     in messages: "the key alice"
    rules    its limits
    running  its requests in flight; elsewhere: those of other routers, as they tell (`routing.shared`)
    code     what routers call it; 0: they do not
    """

    __slots__ = ("_begun", "_requests", "_spent", "_tokens", "code", "elsewhere", "name", "rules", "running")

    def __init__(self, name: str) -> None:
        self.name = name
        self.running = self.elsewhere = self.code = 0
        self.rules = NO_LIMITS
        self._begun = self._spent = 0  # requests and tokens that other routers were not told of
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
        rules, name, running = self.rules, self.name, self.running + self.elsewhere
        if rules.max_concurrent is not None and running >= rules.max_concurrent:
            text = f"There are {running} requests in flight of {name}, and it may have {rules.max_concurrent}."
            return ConcurrencyLimited(f"{text} Wait until one ends.", retry_after=_SOON)
        if self._requests is not None and (missing := self._requests.missing(now)):
            text = f"More requests come of {name} than {rules.requests_per_second:g} per second. Send fewer."
            return RequestsLimited(text, retry_after=missing)
        if self._tokens is not None and (missing := self._tokens.missing(now)):
            text = f"The tokens of {name} are used up: it has {rules.tokens_per_minute:g} per minute. Try again later."
            return TokensLimited(text, retry_after=missing)
        return None

    def fields(self, now: float) -> bytes:
        """Return what a client is told of its limits, as fields of a header, each with its CRLF; b"" without a rate.

        limit      of requests, or tokens, that may come at once after a pause
        remaining  how many of them may come now
        reset      in how many seconds it will be all of them again
        """
        told = []
        for name, bucket in (_REQUESTS, self._requests), (_TOKENS, self._tokens):
            if bucket is not None:
                left = int(bucket.left(now) + _ROUNDING)
                told.append(_FIELDS % (name, int(bucket.size), name, left, name, bucket.filled_in(now)))
        return b"".join(told)

    def begin(self, now: float) -> None:
        """Count a request."""
        self.running += 1
        self._begun += 1
        if self._requests is not None:
            self._requests.spend(1.0, now)

    def end(self, tokens: int, now: float) -> None:
        """Count the end of a request, and the tokens of its prompt and its answer."""
        self.running -= 1
        self._spent += max(tokens, 0)
        if self._tokens is not None and tokens > 0:
            self._tokens.spend(float(tokens), now)

    def untold(self) -> tuple[int, int]:
        """Return the requests and the tokens since the last call: for other routers."""
        found = self._begun, self._spent
        self._begun = self._spent = 0
        return found

    def debts(self, now: float) -> int:
        """Return for other routers in how many milliseconds all requests, and all tokens, may come at once again."""
        requests = 0 if self._requests is None else int(self._requests.filled_in(now) * 1000.0)
        tokens = 0 if self._tokens is None else int(self._tokens.filled_in(now) * 1000.0)
        return min(requests, _MOST_MS) | min(tokens, _MOST_MS) << _MS_BITS

    def owes(self, debts: int, now: float) -> None:
        """Let what another router returned as its debts hold here at least."""
        if self._requests is not None:
            self._requests.fill_in((debts & _MOST_MS) / 1000.0, now, _LONGEST)
        if self._tokens is not None:
            self._tokens.fill_in((debts >> _MS_BITS) / 1000.0, now, _LONGEST)

    def charge(self, requests: int, tokens: int, now: float) -> None:
        """Count requests and tokens of other routers."""
        if self._requests is not None and requests > 0:
            self._requests.owe(float(requests), now, _LONGEST)
        if self._tokens is not None and tokens > 0:
            self._tokens.owe(float(tokens), now, _LONGEST)


class Quotas(Listener):
    """See the module. It hears Finished.

    on            there are limits of clients or models: without, `admit` need not be called
    max_priority  highest priority that a client may ask for if its key does not say
    most          meters of clients with tokens that no rule names
    joined        hears of each new meter; None: nobody does
    touched       whose figures changed, for who tells them to other routers and empties it; None: nobody does
    """

    def __init__(self, max_priority: int = 0, most: int = 1 << 14) -> None:
        self.on = False
        self.joined: Callable[[Meter], None] | None = None
        self.touched: dict[Meter, None] | None = None
        self._most = most
        self.max_priority = max_priority
        self._clients: dict[str, tuple[ClientRules, Meter]] = {}
        self._former: dict[str, Meter] = {}  # that count for nobody now, by name; with requests in flight
        self._others: ClientRules | None = None  # those of clients with tokens that `_clients` does not have
        self._subjects: OrderedDict[str, Meter] = OrderedDict()  # theirs; the one that was used last stands last
        self._models: dict[bytes, tuple[ModelRules, Meter]] = {}
        self._held: dict[int, tuple[tuple[Meter, ...], int]] = {}  # of requests in flight, with the size of the prompt

    def __repr__(self) -> str:
        return f"<Quotas of {len(self._clients)} clients and {len(self._models)} models, {len(self._held)} in flight>"

    @property
    def running(self) -> int:
        """Number of requests in flight that are counted for somebody."""
        return len(self._held)

    def use_clients(self, rules: Mapping[str, ClientRules], others: ClientRules | None = None) -> None:
        """Let these rules of clients count from now on, and no others.

        others  of each client with a token that `rules` does not name; None: these have no limits
        """
        self._leave([meter for _, meter in self._clients.values()])
        self._clients = {}
        for name, each in rules.items():
            meter = self._subjects.pop(name) if name in self._subjects else self._meter(_name_of(name))
            meter.use(each.limits)
            self._clients[name] = (each, meter)
        self._tidy()
        self._others = others
        for meter in self._subjects.values():
            meter.use(NO_LIMITS if others is None else others.limits)
        self._switch()

    def _switch(self) -> None:
        self.on = bool(self._clients or self._models or self._others is not None)

    def _client(self, name: str) -> tuple[ClientRules, Meter] | None:
        """Return what applies to a client, and what it has used; None when nothing does."""
        found = self._clients.get(name)
        if found is not None or self._others is None or not name.startswith(TOKEN):
            return found
        subjects = self._subjects
        meter = subjects.get(name)
        if meter is None:
            meter = subjects[name] = self._meter(_name_of(name))
            meter.use(self._others.limits)
            if len(subjects) > self._most:
                self._forget_one()
        else:
            subjects.move_to_end(name)
        return self._others, meter

    def _leave(self, meters: list[Meter]) -> None:
        """Let these meters count for nobody, until somebody of that name has rules again."""
        self._former.update({meter.name: meter for meter in meters})

    def _meter(self, name: str) -> Meter:
        """Return the meter of this name, or a new one."""
        if name in self._former:
            return self._former.pop(name)
        meter = Meter(name)
        if self.joined is not None:
            self.joined(meter)
        return meter

    def meters(self) -> Iterator[Meter]:
        """Give all meters, some perhaps twice. None of them changes its name, and no two have the same."""
        for _, meter in (*self._clients.values(), *self._models.values()):
            yield meter
        yield from self._subjects.values()
        yield from self._former.values()

    def _touch(self, held: tuple[Meter, ...]) -> None:
        if self.touched is not None:
            for meter in held:
                self.touched[meter] = None

    def _tidy(self) -> None:
        """Forget the meters that count for nobody and have nothing in flight."""
        self._former = {name: meter for name, meter in self._former.items() if meter.running}

    def _forget_one(self) -> None:
        """Forget the meter that was used longest ago. One with requests in flight is as if it was used now; where there
        are many of these, all stay this time: they are no more than the requests."""
        subjects = self._subjects
        for _ in range(_LOOKS):
            oldest = next(iter(subjects))
            if not subjects[oldest].running:
                del subjects[oldest]
                return
            subjects.move_to_end(oldest)

    def use_models(self, rules: Mapping[bytes, ModelRules], aliases: Mapping[bytes, bytes] = _NO_ALIASES) -> None:
        """Let these rules of models count from now on, and no others.

        rules    by the JSON text of their names
        aliases  other names of models, likewise: they share the limits
        """
        self._leave([meter for _, meter in self._models.values()])
        self._models = {}
        for name, each in rules.items():
            meter = self._meter(f"the model {name.decode()}")
            meter.use(each.limits)
            self._models[name] = (each, meter)
        self._tidy()
        self._models |= {alias: self._models[name] for alias, name in aliases.items() if name in self._models}
        self._switch()

    def admit(self, tag: RequestTag, facts: Facts, now: float) -> None:
        """Count a new request, and note in its tag what its client is told of its limits. Its Finished must follow,
        also when it is refused later.

        Raises: Overload (429) with `retry_after`, ModelNotAllowed (403).
        """
        client, model = self._client(tag.client), self._models.get(facts.model)
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
                tag.limits = b"" if client is None else client[1].fields(now)
                raise refusal
        if held:
            for meter in held:
                meter.begin(now)
            self._touch(held)
            self._held[tag.number] = held, len(facts.text)
            if client is not None:
                tag.limits = client[1].fields(now)

    def finished(self, event: Finished) -> None:
        """Count the end of a request."""
        found = self._held.pop(event.tag.number, None)
        if found is not None:
            held, size = found
            usage, now = event.answer.usage, event.tag.start + event.answer.duration
            tokens = _estimated(event, size) if usage is None else max(usage.prompt, 0) + max(usage.completion, 0)
            for meter in held:
                meter.end(tokens, now)
            self._touch(held)

    def priority(self, tag: RequestTag, facts: Facts) -> int:
        """Return the priority of a request: what its client asks for, else that of its key, else that of its model,
        else 0; as far as its key allows it."""
        asked = tag.named[5]
        client, model = self._client(tag.client), self._models.get(facts.model)
        own = 0 if model is None else model[0].priority
        most = max(self.max_priority, own)
        if client is not None:
            rules = client[0]
            own = own if rules.priority is None else rules.priority
            most = max(most, own) if rules.max_priority is None else rules.max_priority
        return min(own if asked is None else asked, most)


def _name_of(name: str) -> str:
    """Return what messages call a client."""
    return f"the subject {name[len(TOKEN) :]}" if name.startswith(TOKEN) else f"the key {name}"


def _estimated(event: Finished, size: int) -> int:
    """Return about how many tokens a request took whose engine did not tell. size: bytes of its prompt.

    A worker that failed before it answered took none of them, as far as the client is concerned.
    """
    answer = event.answer
    if not size or event.leg is None or answer.status >= 400:
        return 0
    if not answer.sent and answer.outcome is not _SERVED and answer.outcome is not _GONE:
        return 0
    return size // _TEXT + answer.sent // (_EVENT if event.tag.streaming else _TEXT)
