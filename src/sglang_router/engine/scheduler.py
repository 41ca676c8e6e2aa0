"""The engine as arithmetic: a waiting queue, continuous batching, chunked prefill and a KV cache, under a
cost model.

    submit ─> waiting ──admit, if its tokens fit──> prefilling (in chunks) ─> running ─> finished
                 ^                                                              │
                 └──────────── retracted: the cache is full, the latest comes last ──┘

`step` does what one forward pass of an engine does and says how long it takes; the caller waits that long
(or does not: tests and replays only add the durations up) and hands out what the pass produced. A pass
prefills as long as someone waits who fits, and decodes one token for everyone otherwise; with `mixed` it
does both, as SGLang with `--enable-mixed-chunk`. The pass that computes the last token of a prompt yields
the first token of the answer. A prompt is in the cache for others as soon as a pass has computed it, the
answer when it is complete; the last token of an answer is never computed, and at least one token of a
prompt always is, so a repeated prompt of n tokens finds n - 1.

A request is admitted when its prompt and a reserve for what it and the running ones will write fit into the
cache. If that guess fails, the request admitted last goes back to the head of the queue with what it has
written so far, and is prefilled again later: mostly from the cache.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from sglang_router.engine.kv import WIDTH, Handle, KVCache, pack


@dataclass(frozen=True)
class CostModel:
    """How long one forward pass takes: base + per request decoded + per token prefilled. In seconds.

    The defaults are those of the mock worker of SMG (lightseekorg/smg), one published calibration:
    8,000 prompt tokens/s, and 6.0 ms + 0.35 ms per running request for a decode step.
    """

    prefill_tokens_per_s: float = 8000.0
    decode_base: float = 0.006
    decode_per_request: float = 0.00035

    def duration(self, prefilled: int, decoded: int) -> float:
        """Seconds for one pass over `prefilled` prompt tokens and one token each of `decoded` requests."""
        return self.decode_base + self.decode_per_request * decoded + prefilled / self.prefill_tokens_per_s


@dataclass(frozen=True)
class Limits:
    """What one pass and one engine can take, in tokens and requests; `reserve` is per request, see above.

    `chunk`, `max_running` and a pool of 524,288 tokens (the caller's `KVCache`) are from the same source.
    """

    chunk: int = 2048
    max_running: int = 256
    reserve: int = 128
    mixed: bool = False


class TokenSource(Protocol):
    """Where output comes from: `next` gives a token and, with the last one, why it is the last."""

    def next(self) -> tuple[int, str | None]: ...


class Request:
    """One prompt and its answer. `prompt` is packed tokens; `limit` the most tokens to write, 0 for none.

    `computed` counts the tokens whose keys and values exist, `cached` those found when it was first
    admitted, `length` prompt and output together. `finish` is None while it lives, then "stop", "length" or
    "abort".
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
        self.handle: Handle | None = None

    def __repr__(self) -> str:
        state = self.finish or ("waiting" if self.handle is None else "running")
        return f"<Request {self.rid} {state}: {self.computed} of {self.prompt} + {self.output} tokens computed>"

    @property
    def left(self) -> int:
        """Tokens it may still write."""
        return max(self.limit - self.output, 0)


@dataclass(slots=True)
class Step:
    """What one pass did: seconds it takes, and the requests that gained a token or ended when it is over."""

    duration: float = 0.0
    prefilled: int = 0
    decoded: int = 0
    advanced: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)


@dataclass
class Totals:
    """Counts since the start, in tokens and requests; what the metrics show."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    retracted: int = 0
    last_hit_rate: float = 0.0


class TooLongError(ValueError):
    """The prompt can never fit into the cache."""


class Scheduler:
    """Owns the queue, the batch and the cache. `holding` admits nobody, `paused` computes nothing at all."""

    def __init__(self, kv: KVCache, cost: CostModel | None = None, limits: Limits | None = None) -> None:
        self.kv = kv
        self.cost = cost or CostModel()
        self.limits = limits or Limits()
        self.totals = Totals()
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self.holding = False
        self.paused = False

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.waiting)} waiting, {self.active} in the batch, {self.kv}>"

    @property
    def active(self) -> int:
        """Requests in the batch."""
        return len(self.prefilling) + len(self.running)

    @property
    def load_tokens(self) -> int:
        """Tokens held by the batch plus tokens waiting, as SGLang reports an engine's load."""
        return self.kv.locked + self.kv.private + sum(request.length for request in self.waiting)

    def submit(self, request: Request) -> None:
        """Queue `request`, its limit cut to what fits. Raises `TooLongError` if not even its prompt does."""
        room = self.kv.capacity - request.prompt
        if not request.prompt or room < bool(request.limit):
            raise TooLongError(f"the prompt has {request.prompt} tokens; the cache holds {self.kv.capacity}")
        request.limit = min(request.limit, room)
        self.waiting.append(request)

    def abort(self, request: Request) -> bool:
        """End `request` now, wherever it is. False if it has ended already."""
        if request.finish is not None:
            return False
        for place in (self.waiting, self.prefilling, self.running):
            if request in place:
                place.remove(request)
        self._end(request, "abort")
        return True

    def retract_all(self) -> None:
        """Put the whole batch back into the queue, in the order it was admitted."""
        for request in reversed(self.running + self.prefilling):
            self._retract(request)

    def flush(self) -> bool:
        """Empty the cache. False, and nothing done, while anything is waiting or running."""
        return not self.waiting and self.kv.reset()

    def step(self) -> Step | None:
        """One forward pass, or None if there is nothing to compute."""
        if self.paused or not (self.prefilling or self.running or (self.waiting and not self.holding)):
            return None
        step = Step()
        done = self._prefill(step)
        if self.running and (self.limits.mixed or not step.prefilled):
            self._decode(step)
        for request in done:
            self._end_prefill(request, step)
        step.duration = self.cost.duration(step.prefilled, step.decoded)
        return step

    # -- one pass ------------------------------------------------------------------------------------------

    def _prefill(self, step: Step) -> list[Request]:
        """Compute up to a chunk of prompt tokens; the requests whose prompt is complete now."""
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
        # Only now: requests of the same pass are computed side by side and cannot use each other's tokens.
        for request in self.prefilling:
            self._commit(request)
        done = self.prefilling[:complete]
        del self.prefilling[:complete]
        return done

    def _admit(self) -> bool:
        """Move the head of the queue into the batch, if it and everyone's reserve fit."""
        if self.holding or not self.waiting or self.active >= self.limits.max_running:
            return False
        request = self.waiting[0]
        reserve = self._reserve(request)
        handle = self.kv.acquire(bytes(request.tokens[:-WIDTH]), request.namespace)
        missing = request.length - handle.length
        if self.kv.available < missing + reserve or not handle.grow(missing):
            handle.close()
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

    def _reserve(self, newcomer: Request) -> int:
        """Tokens to keep free for what the batch and `newcomer` will write; someone alone needs no guess."""
        if not self.active:
            return 0
        most = self.limits.reserve
        return sum(min(one.left, most) for one in (newcomer, *self.prefilling, *self.running))

    def _end_prefill(self, request: Request, step: Step) -> None:
        if request.limit:
            self.running.append(request)
            self._write(request, step)
        else:
            self._end(request, "length", step)

    def _decode(self, step: Step) -> None:
        """One more token for everyone that is running; the latest give way if the cache is full."""
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
        for request in tuple(batch):
            self._write(request, step)

    def _write(self, request: Request, step: Step) -> None:
        token, reason = request.source.next()
        request.tokens += pack((token,))
        request.output += 1
        request.length += 1
        self.totals.generated_tokens += 1
        step.advanced.append(request)
        if reason is None and request.output >= request.limit:
            reason = "length"
        if reason is not None:
            self.running.remove(request)
            self._end(request, reason, step)

    # -- leaving the batch ---------------------------------------------------------------------------------

    def _end(self, request: Request, reason: str, step: Step | None = None) -> None:
        request.finish = reason
        self._release(request)
        if step is None:
            self.totals.aborted += 1
        else:
            self.totals.finished += 1
            step.finished.append(request)

    def _retract(self, request: Request) -> None:
        (self.running if request in self.running else self.prefilling).remove(request)
        request.retractions += 1
        self.totals.retracted += 1
        self._release(request)
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        if request.handle is not None:
            self._commit(request)
            request.handle.close()
            request.handle = None
        request.computed = 0

    def _commit(self, request: Request) -> None:
        assert request.handle is not None
        request.handle.commit(bytes(request.tokens[: request.computed * WIDTH]))
