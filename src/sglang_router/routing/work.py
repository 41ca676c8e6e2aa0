"""The work in front of a worker: how long a new request would wait there for its first token, and how long it takes.

    lease.sent     --> Work.sent     due = when its prompt is believed to be read     free_at moves behind it
    lease.began    --> Work.began    the first byte of a stream: due was wrong by so much, and all behind it with it
    lease.close    --> Work.ended    what was never read is taken off; how long the answer took

    now        head                          free_at
     |----------|-----------|-------|-----------|            a virtual clock: one prompt after the other
       prompt A    prompt B   unary     prompt C
     '------------- backlog(now) ---------------'

Engines read prompts in order of arrival, one after the other or some together, so one number tells when a worker is
free: `free_at`. It needs no timer and no look at the single requests. The first byte of a stream says when its prompt
was read, and moves the clock by the error; after the last of them, the clock is right whatever was believed before. A
request without a stream gives no such sign before its end: its prompt counts for as long as it is believed to take,
and no longer. A stream that is late lets those behind it wait: how late it is stands for as much again. After a minute
it is given up, or one stream that never begins would keep all others away from a worker that is well.

Everything is measured per worker, from what passes (`routing.pace`). The pace of prompts comes from the times in which
first bytes are awaited: such a time is busy from its beginning to its end, like what the engines' own counter of busy
time says, which counts as well where an engine has it.

Bytes are those of the routing text that the worker is not believed to have cached. Nothing is told to the work of a
worker whose policy does not ask for it.

*Several routers* in front of a worker (`routing.shared`) tell each other until when it is busy. The latest of these
times counts, not their sum: whoever sends a prompt puts it behind all that it knows of. And they tell what they send
there, because a busy time in which the prompts of others were read, too, says as much of these (`routing.heard`). It
counts in full only from a first byte on, or from an idle worker on. When prompts of others are over that are in front
is an estimate, and its errors would look like time that each request takes, however short: what is measured from there
changes both figures of the pace alike, and with that the estimate.

Pure: time is an argument.
"""

from __future__ import annotations

import math
from typing import Final

from sglang_router.routing.heard import Heard
from sglang_router.routing.pace import BYTES_PER_TOKEN, Paces

_BLOCK: Final = 16
"""First bytes after which a busy time is measured, even if it goes on."""
_LAST_GAP: Final = 0.05
"""How much the last pause between two requests counts."""
_LEAST_GAP: Final = 1e-4
_LONGEST_PAUSE: Final = 60.0
"""A longer one counts as so many seconds: a night without requests says nothing of the next morning."""
_GIVEN_UP: Final = 60.0
"""Seconds after which a stream that is late is awaited no more."""
_FORGET: Final = 0.7
"""What is left of what was measured after `_FORGET_SECONDS`: an unused worker goes back to the mean of the pool."""
_FORGET_SECONDS: Final = 60.0
_STRETCH: Final = 0.1
"""The least change of the pace that moves what is awaited."""
_ANSWERS: Final = 8
"""AnswerPace that are counted together."""
_LATEST: Final = math.inf
_SURE: Final = 0  # what began a busy time: a first byte,
_ALONE: Final = 1  # a prompt in front of which nothing was, as far as was known then,
_BEHIND: Final = 2  # one that stood behind prompts of other routers until an estimated time,
_BROKEN: Final = 3  # or a stream that was given up: nobody knows what is in front of the next one


class Work:
    """See the module. One for each life of a worker.

    active           a policy wants to know: without, nothing is told to it
    free_at          when all prompts sent there are believed to be read; seconds of the caller's clock
    gap              mean seconds between two requests that were sent there; of a new worker, what it is elsewhere
    requests         sent there by this router, to whatever process
    last             when the last one was; minus infinity before the first
    elsewhere_until  until when the prompts sent there by other routers take, as they tell; 0: nobody does
    head             when the oldest awaited stream is believed to begin; infinity without one
    prompts          how long it takes to read them; answers: to write them
    bytes_per_token  bytes of routing text for one token of a prompt
    """

    __slots__ = (
        "_answer_seconds",
        "_answers",
        "_answers_beside",
        "_awaiting",
        "_block_bytes",
        "_block_doubt",
        "_block_items",
        "_block_start",
        "_common",
        "_forgot_at",
        "_heard",
        "_prefilled",
        "_shift",
        "active",
        "answers",
        "bytes_per_token",
        "elsewhere_until",
        "free_at",
        "gap",
        "head",
        "last",
        "prompts",
        "requests",
    )

    def __init__(self, common: Paces | None = None) -> None:
        self.active = False
        self.free_at = 0.0
        self.elsewhere_until = 0.0
        self.head = _LATEST
        self.gap = 1.0
        self.requests = 0
        self.last = -_LATEST
        own = Paces()
        self.prompts, self.answers = own.prompts, own.answers
        self.bytes_per_token = BYTES_PER_TOKEN
        self._awaiting: dict[object, float] = {}  # streams without a first byte, oldest first; due, without the shift
        self._shift = 0.0  # seconds by which the clock was moved
        self._block_start = 0.0  # of the busy time that is measured
        self._block_items = 0
        self._block_bytes = 0
        self._block_doubt = _SURE
        self._heard = Heard()  # of other routers
        self._answers = self._answers_beside = 0  # that are not counted yet
        self._answer_seconds = 0.0
        self._prefilled = (0, 0)  # tokens and microseconds, by the engine's own count
        self._forgot_at = _LATEST
        self._common: Paces | None = None
        if common is not None:
            self.join(common)

    def __repr__(self) -> str:
        return f"<Work until {self.free_at:.3f}, {len(self._awaiting)} awaited, {self.prompts!r}, {self.answers!r}>"

    def join(self, common: Paces) -> Paces:
        """Begin to measure, and share it with the other workers of a pool; return with whom it is shared.

        A policy that looks at it in the shadow of another one finds it shared already.
        """
        if self._common is None:
            self._common = common
            self.active = True
            if not self.prompts.weight:
                self.prompts.expect(common.prompts)
                self.answers.expect(common.answers)
            if self.last == -_LATEST:
                self.gap = common.gap
        return self._common

    def leave(self) -> None:
        """End measuring: the worker leaves the pool."""
        self._common = None
        self.active = False

    def count_in(self, bytes_per_token: float) -> None:
        """Take how many bytes a token has where that is not as in usual texts. Call it for a new worker."""
        self.bytes_per_token = bytes_per_token
        if self._common is not None:
            if not self._common.prompts.weight:
                self._common.prompts.count_in(bytes_per_token)
            self.prompts.expect(self._common.prompts)

    def renewed(self) -> Work:
        """Return the work of another process in the worker's place: nothing, at the pace of the pool."""
        renewed = Work(self._common)
        renewed.requests = self.requests  # other routers count on from what they were told
        renewed.bytes_per_token = self.bytes_per_token  # it serves the same model
        return renewed

    # -- what is in front of a new request -----------------------------------------------------------------------------

    def backlog(self, now: float) -> float:
        """Return the seconds until all prompts sent there are believed to be read, those of other routers too."""
        return max(self.own_backlog(now), self.elsewhere_until - now)

    def own_backlog(self, now: float) -> float:
        """Return the seconds until the prompts of this router are believed to be read, with those before them."""
        head = self.head
        if head < now:
            return max(self.free_at - head, 0.0) + now - head
        return max(self.free_at - now, 0.0)

    def prefill(self, uncached: float) -> float:
        """Return the seconds that it takes to read a prompt of which so many bytes are not cached."""
        return self.prompts.expected(1.0, uncached)

    def until_read(self, size: int, now: float) -> float:
        """Return the seconds until a new prompt is read of which so many bytes are not cached; negative: unknown."""
        if not self.active:
            return -1.0
        return self.backlog(now) + (self.prefill(size) if size else 0.0)

    @property
    def awaited(self) -> int:
        """Number of streams without a first byte."""
        return len(self._awaiting)

    # -- what happens --------------------------------------------------------------------------------------------------

    def sent(self, key: object, uncached: int, streams: bool, now: float) -> float:
        """Add a request; return when it is due, for `ended`.

        uncached  bytes of prompt that the worker must read; 0: unknown
        """
        prompts, common = self.prompts, self._common
        self.requests += 1
        pause = now - self.last
        if pause < _LATEST:
            if pause > _LONGEST_PAUSE:
                pause = _LONGEST_PAUSE
            self.gap = max(self.gap + (pause - self.gap) * _LAST_GAP, _LEAST_GAP)
            if common is not None:
                common.gap = self.gap
        self.last = now
        start = min(now, self.head)
        if self.free_at > start:
            start = self.free_at
        behind = self.elsewhere_until > start
        if behind:
            start = self.elsewhere_until
        if not self._awaiting:
            if streams:  # what is left of requests without a stream comes before
                self._block_start = start
                self._block_doubt = _BEHIND if behind else _ALONE
                if self._heard.any:
                    self._heard.begin()
        elif not streams:
            self._block_items += 1
            self._block_bytes += uncached
        self.free_at = due = start + prompts.per_item + uncached * prompts.per_unit
        if streams:
            self._awaiting[key] = due - self._shift
            if self._heard.any:
                self._heard.sent(key)
            if due < self.head:
                self.head = due
        return due - self._shift

    def settle(self) -> None:
        """Follow what was learnt of the other workers meanwhile: this one may get its requests from other routers."""
        common = self._common
        if common is not None:
            self.prompts.settle(common.prompts)
            self.answers.settle(common.answers)

    def passed(self, requests: int, now: float) -> None:
        """Take how many requests other routers have sent there since that was told last."""
        left, pause = (1.0 - _LAST_GAP) ** requests, now - self.last
        if pause < _LATEST:
            pause = min(max(pause, 0.0), _LONGEST_PAUSE) / requests
            self.gap = max(pause + (self.gap - pause) * left, _LEAST_GAP)
        self.last = now
        self._heard.more(requests, 0)

    def reads(self, uncached: int) -> None:
        """Take that the worker reads a prompt of another router, too: its time is not that of this router's alone."""
        self._heard.more(0, uncached)

    def began(self, key: object, uncached: int, now: float) -> None:
        """Take the first byte of a stream. That of one that was given up says nothing any more."""
        due = self._awaiting.pop(key, None)
        if due is None:
            return
        self._move(now - due - self._shift)
        if self._heard.any and self._is_doubtful(key, uncached, now):
            self._begin_block(now)
            return
        self._block_items += 1
        self._block_bytes += uncached
        if not self._awaiting or self._block_items >= min(_BLOCK, self.prompts.weight):
            self._measure(now)

    def answered(self, seconds: float, beside: int) -> None:
        """Take how long an answer took from its first byte on, with so many requests there when it began."""
        self._answers += 1
        self._answer_seconds += max(seconds, 0.0)
        self._answers_beside += beside
        if self._answers >= min(_ANSWERS, self.answers.weight):
            count, common = float(self._answers), self._common
            if common is not None:
                common.answers.add(self._answer_seconds / count, self._answers_beside / count)
            others = None if common is None else common.answers
            self.answers.add(self._answer_seconds / count, self._answers_beside / count, others)
            self._answers = self._answers_beside = 0
            self._answer_seconds = 0.0

    def ended(self, key: object, due: float, uncached: int, now: float, beside: int = 0) -> None:
        """Take the end of a request without a first byte: of one without a stream, or of a leg that failed.

        beside  so many requests were there when a request without a stream was sent that is served now; 0: it failed
        """
        early = due + self._shift - now
        if self._awaiting.pop(key, None) is None:
            if early > 0.0:  # it is done sooner than its prompt was believed to be read
                self._move(-early if beside else -min(early, self.prefill(uncached)))
            elif beside:
                self.answered(-early, beside)
            return
        if early > 0.0:
            self._move(-min(early, self.prefill(uncached)))
        self._heard.gone(key)
        self._reset_head()
        self._begin_block(now, _BROKEN)

    def told(self, tokens: int, microseconds: int) -> None:
        """Take an engine's own counters: uncached tokens that it has read, and how long it was busy with that."""
        if not self.active:
            return
        before, self._prefilled = self._prefilled, (tokens, microseconds)
        read, busy = tokens - before[0], (microseconds - before[1]) / 1e6
        if before[1] and read > 0 and busy > 0.0:
            common = self._common
            units = read * self.bytes_per_token
            if common is not None:
                common.prompts.add(0.0, units, busy)
            self.prompts.add(0.0, units, busy, None if common is None else common.prompts)

    def forget(self, now: float) -> None:
        """Let what was measured count less, by the time since the last call: a worker that gets no requests goes back
        to the mean. Give up the streams that are late by more than `_GIVEN_UP` seconds."""
        passed, self._forgot_at = max(now - self._forgot_at, 0.0), now
        common = self._common
        if common is not None and passed > 0.0:
            share = _FORGET ** (passed / _FORGET_SECONDS)
            self.prompts.fade(share)
            self.prompts.settle(common.prompts)
            self.answers.fade(share)
            self.answers.settle(common.answers)
        before = now - _GIVEN_UP - self._shift
        late = [key for key, due in self._awaiting.items() if due < before]
        for key in late:
            del self._awaiting[key]
            self._heard.gone(key)
        if late:
            self._reset_head()
            self._begin_block(now, _BROKEN)

    # -- the clock, and what is measured -------------------------------------------------------------------------------

    def _move(self, seconds: float) -> None:
        """Move the clock, and with it everything that is due."""
        self._shift += seconds
        self.free_at += seconds
        self._reset_head()

    def _reset_head(self) -> None:
        self.head = next(iter(self._awaiting.values())) + self._shift if self._awaiting else _LATEST

    def _measure(self, now: float) -> None:
        """End a busy time, unless prompts were read together and none of its time has passed."""
        seconds = now - self._block_start
        if seconds > 0.0:
            items, units = float(self._block_items), float(self._block_bytes)
            if self._heard.any:
                others = self._heard.between
                items, units = items + others[0], units + others[1]
            prompts, common = self.prompts, self._common
            before = prompts.expected(items, units)
            if common is not None:
                common.prompts.add(items, units, seconds)
            prompts.add(items, units, seconds, None if common is None else common.prompts)
            if self._awaiting and before > 0.0:  # not: prompts that were all cached, at a pace without a part for each
                self._stretch(prompts.expected(items, units) / before, now)
        elif self._awaiting:
            return
        self._begin_block(now)

    def _begin_block(self, now: float, doubt: int = _SURE) -> None:
        self._block_start, self._block_items, self._block_bytes = now, 0, 0
        self._block_doubt = doubt
        if self._heard.any:
            self._heard.go_on()

    def _is_doubtful(self, key: object, uncached: int, now: float) -> bool:
        """Take that a stream begins; return whether prompts of other routers may have been in front of the first one of
        this busy time."""
        heard = self._heard.began(key)
        doubt, self._block_doubt = self._block_doubt, _SURE
        if doubt == _BEHIND:
            self._weigh(uncached, now - self._block_start)
        return doubt > _ALONE or (doubt == _ALONE and heard)

    def _weigh(self, uncached: int, seconds: float) -> None:
        """Measure roughly how long a prompt took that stood behind those of other routers."""
        common = None if self._common is None else self._common.prompts
        if common is not None:
            common.rescale(1.0, uncached, seconds)
        self.prompts.rescale(1.0, uncached, seconds, common)

    def _stretch(self, ratio: float, now: float) -> None:
        """Let all that is due take so many times as long, if that makes a difference."""
        if abs(ratio - 1.0) > _STRETCH:
            base, shift = min(now, self.head), self._shift
            for key, due in self._awaiting.items():
                self._awaiting[key] = base + (due + shift - base) * ratio - shift
            self.free_at = base + (self.free_at - base) * ratio
            self._reset_head()
