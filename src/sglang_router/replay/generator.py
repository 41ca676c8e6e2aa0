"""Loads that are made up: `gen:NAME` or `gen:NAME,key=value,...`, see `SHAPES`.

    groups       each request begins with the prefix of one of `groups` groups, all equally frequent
    hot-prefix   the same, but a `share` of all requests belongs to one group
    strangers    short groups, and a `share` of long prompts that nobody has seen
    bursts       groups, and every `every` seconds a flash crowd: `burst` requests of one new group within `within`
    sessions     chats that all begin with one system prompt; each turn adds the answer and `tail` tokens, and comes
                 `think` seconds (mean) after the answer

Requests, or new sessions, come as a Poisson process of `rate` a second; the generator ends after `requests` of them all
together. Lengths in tokens: `prefix` is what a group shares (of sessions: the system prompt), `tail` and `output` are
means, spread evenly between a half and one and a half.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from sglang_router.errors import ConfigError
from sglang_router.replay.load import MOST, Load, LoadRequest, pages_of

PAGE = 16
_LEAST = 1e-3
"""The least of every setting but `share`: with less, nearly nothing happens, or too much for the memory."""
_MOST_REQUESTS = 1_000_000_000


class LoadShape(NamedTuple):
    """The figures of a generated load, see the module; all can be given."""

    rate: float = 40.0
    requests: int = 4000
    groups: int = 64
    prefix: int = 2048
    tail: int = 256
    output: int = 128
    share: float = 0.0
    stranger: int = 16384
    burst: int = 64
    within: float = 1.0
    every: float = 30.0
    turns: int = 8
    think: float = 10.0


SHAPES = {
    "groups": LoadShape(),
    "hot-prefix": LoadShape(share=0.5),
    "strangers": LoadShape(prefix=512, tail=64, share=0.05, rate=16.0),
    "bursts": LoadShape(rate=20.0),
    "sessions": LoadShape(rate=3.0, prefix=4096),
}
"""The generated loads by name, with what is not given."""


class _Generated(Load):
    """What all generated loads have in common: chance, lengths, and numbers of spaces."""

    def __init__(self, name: str, shape: LoadShape, seed: int) -> None:
        super().__init__(name, PAGE)
        self.shape = shape
        self.rng = random.Random(f"{name} {seed}")
        self._asks = 0
        self._spaces = shape.groups

    def whole(self, tokens: float) -> int:
        """Return a length of whole pages near this one."""
        return max(1, round(tokens / PAGE)) * PAGE

    def about(self, mean: float) -> int:
        """Return a length between a half and one and a half of the mean."""
        return self.whole(mean * self.rng.uniform(0.5, 1.5))

    def new_space(self) -> int:
        """Return the number of a space that nothing has used."""
        self._spaces += 1
        return self._spaces

    def ask(self, at: float, shared: int, prefix: int, own: int) -> LoadRequest:
        """Return a request: `prefix` tokens of the space `shared`, then `own` tokens of its own, and an answer."""
        self._asks += 1
        output = self.about(self.shape.output)
        tail = pages_of(self.new_space(), (own + output) // PAGE)
        return LoadRequest(self._asks, at, pages_of(shared, prefix // PAGE) + tail, prefix + own, output)

    @property
    def done(self) -> bool:
        """Whether all requests were made."""
        return self._asks >= self.shape.requests

    def times(self) -> Iterator[float]:
        """Give the times of a Poisson process, until all requests are made."""
        at = 0.0
        while not self.done:
            at += self.rng.expovariate(self.shape.rate)
            yield at


class Groups(_Generated):
    """groups, hot-prefix and strangers."""

    def __init__(self, name: str, shape: LoadShape, seed: int) -> None:
        super().__init__(name, shape, seed)
        self._strange = name == "strangers"

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the requests of all groups."""
        shape, rng = self.shape, self.rng
        prefix = self.whole(shape.prefix)
        for at in self.times():
            special = rng.random() < shape.share
            if special and self._strange:
                yield self.ask(at, 0, 0, self.about(shape.stranger))
            else:
                group = 0 if special else rng.randrange(shape.groups)
                yield self.ask(at, group, prefix, self.about(shape.tail))


class Bursts(_Generated):
    """bursts: groups, and flash crowds."""

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the requests of the groups and of the crowds, in the order of time."""
        shape, rng = self.shape, self.rng
        prefix = self.whole(shape.prefix)
        crowd: list[float] = []
        crowd_at, group = shape.every, 0
        for at in self.times():
            while at >= crowd_at:
                group = self.new_space()
                crowd += [crowd_at + rng.uniform(0.0, shape.within) for _ in range(shape.burst)]
                crowd.sort(reverse=True)
                crowd_at += shape.every
            while crowd and crowd[-1] <= at and not self.done:
                yield self.ask(crowd.pop(), group, prefix, self.about(shape.tail))
            if not self.done:
                yield self.ask(at, rng.randrange(shape.groups), prefix, self.about(shape.tail))


class Chats(_Generated):
    """sessions: each has a space of its own behind the system prompt."""

    def __init__(self, name: str, shape: LoadShape, seed: int) -> None:
        super().__init__(name, shape, seed)
        self._turns: dict[bytes, tuple[int, int]] = {}  # by session: its space, and the turns that are left

    def arrivals(self) -> Iterator[LoadRequest]:
        """Give the first turns."""
        for at in self.times():
            space = self.new_space()
            session = b"session%d" % space
            turns = self.rng.randint(max(1, self.shape.turns // 2), self.shape.turns * 3 // 2)
            self._turns[session] = space, turns - 1
            yield self._turn(at, session, space, self.whole(self.shape.prefix))

    def answered(self, ask: LoadRequest, now: float) -> LoadRequest | None:
        """Return the next turn of a session."""
        space, left = self._turns[ask.session]
        if not left or self.done:
            del self._turns[ask.session]
            return None
        self._turns[ask.session] = space, left - 1
        return self._turn(now + self.rng.expovariate(1 / self.shape.think), ask.session, space, ask.prompt + ask.output)

    def _turn(self, at: float, session: bytes, space: int, history: int) -> LoadRequest:
        self._asks += 1
        prompt, output = history + self.about(self.shape.tail), self.about(self.shape.output)
        system = self.whole(self.shape.prefix) // PAGE
        pages = pages_of(0, system) + pages_of(space, (prompt + output) // PAGE - system)
        return LoadRequest(self._asks, at, pages, prompt, output, session)


_KINDS: dict[str, type[_Generated]] = {
    "groups": Groups,
    "hot-prefix": Groups,
    "strangers": Groups,
    "bursts": Bursts,
    "sessions": Chats,
}


def generated(words: str, seed: int) -> Load:
    """Return the load that `NAME,key=value,...` describes. Raises: ConfigError."""
    name, *settings = words.split(",")
    if name not in SHAPES:
        raise ConfigError(f"unknown generator {name!r}: choose from {', '.join(SHAPES)}")
    shape = SHAPES[name]
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in LoadShape._fields:
            raise ConfigError(f"unknown setting {key!r} of a generator: choose from {', '.join(LoadShape._fields)}")
        number: Any = _number(key, value, type(getattr(shape, key)))
        shape = shape._replace(**{key: number})
    return _KINDS[name](name, shape, seed)


def _number(key: str, value: str, kind: type[float]) -> float:
    try:
        number = kind(value)
    except ValueError:
        raise ConfigError(f"{key}={value}: a number is needed") from None
    least = 0.0 if key == "share" else _LEAST
    if not least <= number <= (_MOST_REQUESTS if kind is float or key == "requests" else MOST):
        raise ConfigError(f"{key}={value}: out of range")
    return number
