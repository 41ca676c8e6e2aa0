"""The engine without I/O or clock: a queue, continuous batching, chunked prefill and a KV cache, under a cost model.

    submit ─> waiting ──admit, if its tokens fit──> prefilling (in chunks) ─> running ─> finished
                 ^                                                              │
                 └── retracted: the cache is full; the request admitted last ───┘

`step` does one forward pass and says how long it takes. The caller waits that long (tests and replays only add the
durations up) and delivers what the pass produced. A pass prefills as long as a queued request fits; otherwise it
decodes one token for every running request. With `mixed` it does both, as SGLang does with `--enable-mixed-chunk`. The
pass that computes the last token of a prompt also produces the first token of the answer. Other requests find a prompt
in the cache as soon as a pass has computed it, and an answer when it is complete. The last token of an answer is never
computed, and at least one token of a prompt always is; so a repeated prompt of n tokens finds n - 1 in the cache.

A request is admitted when its prompt fits into the cache, together with a reserve for the tokens that it and the
running requests will write. If the reserve was too small, the request that was admitted last goes back to the head of
the queue with the tokens it has written, and is prefilled again later, mostly from the cache.

A simulation that takes thousands of passes in a second of its own skips those that are all alike: `alike` says of how
many it knows that each only decodes, with the same batch, and `decode` does them at once. The state is then the same as
after as many steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from sglang_router.engine.kv import WIDTH, CacheHandle, KVCache, pack


@dataclass(frozen=True)
class CostModel:
    """The duration of one forward pass, in seconds: base + per decoded request + per prefilled token.

    The defaults are those of the mock worker of SMG (lightseekorg/smg), a published calibration: 8,000 prompt tokens/s,
    and 6.0 ms + 0.35 ms per running request for a decode step.
    """

    prefill_tokens_per_s: float = 8000.0
    decode_base: float = 0.006
    decode_per_request: float = 0.00035

    def duration(self, prefilled: int, decoded: int) -> float:
        """Return the seconds for one pass over `prefilled` prompt tokens and one token for each of `decoded`
        requests."""
        return self.decode_base + self.decode_per_request * decoded + prefilled / self.prefill_tokens_per_s


@dataclass(frozen=True)
class BatchLimits:
    """Limits of one pass and of the batch, in tokens and requests; `reserve` is per request, see above.

    `chunk`, `max_running` and a pool of 524,288 tokens (the caller's `KVCache`) are from the same source.
    """

    chunk: int = 2048
    max_running: int = 256
    reserve: int = 128
    mixed: bool = False


class TokenSource(Protocol):
    """Produces output: `next` returns a token and, with the last token, the finish reason."""

    def next(self) -> tuple[int, str | None]: ...


class EngineRequest:
    """One prompt and its answer. `tokens` are packed; `limit` is the most tokens to write, 0 for none.

    `computed` counts the tokens whose keys and values exist, `cached` those found in the cache when it was first
    admitted, `length` the tokens of prompt and output together. `finish` is None until it ends, then "stop", "length"
    or "abort".
    """

    __slots__ = (
        "cached",
        "computed",
        "finish",
        "handle",
        "length",
        "limit",
        "namespace",
        "output",
        "prompt",
        "retractions",
        "rid",
        "source",
        "tokens",
    )

    def __init__(self, rid: str, prompt: bytes, source: TokenSource, limit: int, namespace: str = "") -> None:
        self.rid = rid
        self.prompt = len(prompt) // WIDTH
        self.tokens = bytearray(prompt)
        self.source = source
        self.limit = limit
        self.namespace = namespace
        self.output = 0
        self.length = self.prompt
        self.computed = 0
        self.cached = 0
        self.retractions = 0
        self.finish: str | None = None
        self.handle: CacheHandle | None = None

    def __repr__(self) -> str:
        state = self.finish or ("waiting" if self.handle is None else "running")
        return f"<EngineRequest {self.rid} {state}: {self.computed} of {self.prompt} + {self.output} tokens computed>"

    def packed(self, length: int) -> bytes:
        """Return its first `length` tokens, prompt and answer together, packed."""
        return bytes(self.tokens[: length * WIDTH])

    def wrote(self, token: int) -> None:
        """Take a token that its source has produced."""
        self.tokens += pack((token,))
        self.output += 1
        self.length += 1

    @property
    def certain(self) -> int:
        """Tokens that it will write for sure, besides its last one; 0 when its source may end at any token."""
        return 0

    def write(self, count: int) -> None:
        """Let its source produce `count` of the tokens that are certain."""
        for _ in range(count):
            self.wrote(self.source.next()[0])

    @property
    def left(self) -> int:
        """Tokens that it may still write."""
        return max(self.limit - self.output, 0)


@dataclass(slots=True)
class BatchStep:
    """The result of one pass: its duration in seconds, and the requests that got a token or ended in it."""

    duration: float = 0.0
    prefilled: int = 0
    decoded: int = 0
    advanced: list[EngineRequest] = field(default_factory=list)
    finished: list[EngineRequest] = field(default_factory=list)


@dataclass
class EngineTotals:
    """Counts since the start, in tokens and requests, for the metrics."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    retracted: int = 0
    last_hit_rate: float = 0.0


class TooLongError(ValueError):
    """The prompt is too long for the whole cache."""


class EngineScheduler:
    """Owns the queue, the batch and the cache. `holding` stops admission, `paused` stops all computing."""

    def __init__(self, kv: KVCache, cost: CostModel | None = None, limits: BatchLimits | None = None) -> None:
        self.kv = kv
        self.cost = cost or CostModel()
        self.limits = limits or BatchLimits()
        self.totals = EngineTotals()
        self.waiting: deque[EngineRequest] = deque()
        self.prefilling: list[EngineRequest] = []
        self.running: list[EngineRequest] = []
        self.holding = False
        self.paused = False
        # Tokens that the head of the queue lacks for its admission, at least; 0: it was not tried, or much has changed.
        self._short = 0

    def __repr__(self) -> str:
        return f"<EngineScheduler {len(self.waiting)} waiting, {self.active} in the batch, {self.kv}>"

    @property
    def active(self) -> int:
        """Requests in the batch."""
        return len(self.prefilling) + len(self.running)

    @property
    def load_tokens(self) -> int:
        """Tokens held by the batch plus tokens in the queue, as SGLang reports an engine's load."""
        return self.kv.locked + self.kv.private + sum(request.length for request in self.waiting)

    def submit(self, request: EngineRequest) -> None:
        """Queue `request` and reduce its limit to what fits. Raises `TooLongError` if even the prompt does not fit."""
        room = self.kv.capacity - request.prompt
        if not request.prompt or room < bool(request.limit):
            raise TooLongError(f"the prompt has {request.prompt} tokens; the cache holds {self.kv.capacity}")
        request.limit = min(request.limit, room)
        self.waiting.append(request)

    def abort(self, request: EngineRequest) -> bool:
        """End `request` now. Return False if it has ended already."""
        if request.finish is not None:
            return False
        for place in (self.waiting, self.prefilling, self.running):
            if request in place:
                place.remove(request)
        self._end(request, "abort")
        return True

    def retract_all(self) -> None:
        """Move the whole batch back to the queue, in the order of admission."""
        for request in reversed(self.running + self.prefilling):
            self._retract(request)

    def flush(self) -> bool:
        """Empty the cache. While requests are queued or running, do nothing and return False."""
        return not self.waiting and self.kv.reset()

    def step(self) -> BatchStep | None:
        """Do one forward pass. Return None if there is nothing to compute."""
        if self.paused or not (self.prefilling or self.running or (self.waiting and not self.holding)):
            return None
        step = BatchStep()
        self._short = 0
        done = self._prefill(step)
        if self.running and (self.limits.mixed or not step.prefilled):
            self._decode(step)
        for request in done:
            self._end_prefill(request, step)
        step.duration = self.cost.duration(step.prefilled, step.decoded)
        return step

    def alike(self) -> int:
        """Return how many of the next passes only decode one token for each running request, as far as is known now.

        None of them admits, ends or retracts a request, if none is submitted or aborted meanwhile.
        """
        batch = len(self.running)
        if self.paused or self.prefilling or not batch:
            return 0
        passes = min([request.certain for request in self.running])
        if self.waiting and not self.holding and self.active < self.limits.max_running:
            # Each pass shrinks the reserve by at most one token a request, and leaves not more slots.
            passes = min(passes, -(-self._short // batch))
        return max(0, min(passes, self.kv.available // batch - self.kv.page_size + 1))

    def decode(self, passes: int) -> None:
        """Do this many passes, at most `alike`, at once. Each takes `cost.duration(0, len(running))`."""
        batch = self.running
        for request in batch:
            assert request.handle is not None
            request.handle.grow(passes)
            request.computed += passes
            request.write(passes)
        self.totals.generated_tokens += passes * len(batch)
        self._short = max(0, self._short - passes * len(batch))

    # -- one pass ------------------------------------------------------------------------------------------

    def _prefill(self, step: BatchStep) -> list[EngineRequest]:
        """Compute up to a chunk of prompt tokens. Return the requests whose prompt is complete now."""
        budget = self.limits.chunk
        complete = 0
        while budget > 0 and (complete < len(self.prefilling) or self._admit()):
            request = self.prefilling[complete]
            take = min(request.length - request.computed, budget)
            budget -= take
            step.prefilled += take
            request.computed += take
            if request.computed < request.length:
                break
            complete += 1
        # Commit after the loop: requests of the same pass are computed together and cannot use each other's tokens.
        for request in self.prefilling:
            self._commit(request)
            self._short = 0  # the head of the queue may find some of this now
        done = self.prefilling[:complete]
        del self.prefilling[:complete]
        return done

    def _admit(self) -> bool:
        """Move the head of the queue into the batch if it fits together with the reserve. Return whether it did."""
        if self.holding or not self.waiting or self.active >= self.limits.max_running:
            return False
        request = self.waiting[0]
        reserve = self._reserve(request)
        handle = self.kv.acquire(request.packed(request.length - 1), request.namespace)
        missing = request.length - handle.length
        short = missing + reserve - self.kv.available
        if short > 0 or not handle.grow(missing):
            handle.close()
            self._short = max(short, 1)
            return False
        self.waiting.popleft()
        request.handle = handle
        request.computed = handle.matched
        if not request.retractions:
            request.cached = handle.matched
            self.totals.prompt_tokens += request.prompt
            self.totals.cached_tokens += request.cached
            self.totals.last_hit_rate = request.cached / request.prompt
        self.prefilling.append(request)
        return True

    def _reserve(self, newcomer: EngineRequest) -> int:
        """Return the tokens to keep free for the output of the batch and `newcomer`; 0 if the batch is empty."""
        if not self.active:
            return 0
        most = self.limits.reserve
        return sum(min(one.left, most) for one in (newcomer, *self.prefilling, *self.running))

    def _end_prefill(self, request: EngineRequest, step: BatchStep) -> None:
        if request.limit:
            self.running.append(request)
            self._write(request, step)
        else:
            self._end(request, "length", step)

    def _decode(self, step: BatchStep) -> None:
        """Decode one token for every running request; retract the latest requests if the cache is full."""
        batch = self.running
        at = 0
        while at < len(batch):
            handle = batch[at].handle
            assert handle is not None
            if handle.grow(1):
                batch[at].computed += 1
                at += 1
            else:
                self._retract(batch[-1])
        step.decoded = len(batch)
        self._short = max(0, self._short - len(batch))
        for request in tuple(batch):
            self._write(request, step)

    def _write(self, request: EngineRequest, step: BatchStep) -> None:
        token, reason = request.source.next()
        request.wrote(token)
        self.totals.generated_tokens += 1
        step.advanced.append(request)
        if reason is None and request.output >= request.limit:
            reason = "length"
        if reason is not None:
            self.running.remove(request)
            self._end(request, reason, step)

    # -- leaving the batch ---------------------------------------------------------------------------------

    def _end(self, request: EngineRequest, reason: str, step: BatchStep | None = None) -> None:
        request.finish = reason
        self._short = 0
        self._release(request)
        if step is None:
            self.totals.aborted += 1
        else:
            self.totals.finished += 1
            step.finished.append(request)

    def _retract(self, request: EngineRequest) -> None:
        (self.running if request in self.running else self.prefilling).remove(request)
        request.retractions += 1
        self._short = 0
        self.totals.retracted += 1
        self._release(request)
        self.waiting.appendleft(request)

    def _release(self, request: EngineRequest) -> None:
        if request.handle is not None:
            self._commit(request)
            request.handle.close()
            request.handle = None
        request.computed = 0

    def _commit(self, request: EngineRequest) -> None:
        assert request.handle is not None
        request.handle.commit(request.packed(request.computed))
