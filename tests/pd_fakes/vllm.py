"""A fake vLLM engine with Nixl, pull or push: its work is what `kv_transfer_params` of the request say.

    {"do_remote_decode": true, ...}    prefill: answers one token and parameters, and holds its blocks until they are
                                       read or their lease has ended
    what a prefill answered            decode: reads the blocks over a real connection to remote_host:remote_port
    none, or null                      computes everything itself
                                       (push: that prefill sends those whose request has the same x-request-id)
    {"do_remote_prefill": true}        ends the engine: only a client that should not would send it

Time is the test's: leases end by `clock`, not by waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any, NamedTuple

from pd_fakes.edge import WITHIN, EdgeServer, Reply, Request, Stage, ask, read_request
from pd_fakes.texts import (
    PrefixCache,
    answer_text,
    answer_token,
    prompts_of,
    samples_of,
    sse,
    tokens_of,
    wanted_tokens,
)
from routers import free_port

BLOCK = 32
GENERATIVE = ("/v1/completions", "/v1/chat/completions")
REMOTE = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")


class Clock:
    """Time as the test wants it, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0


class Held(NamedTuple):
    """Blocks of one prefill that wait for their decode; `base` is its name without what the engine adds."""

    base: str
    prompt: str
    until: float
    blocks: int


class VllmError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Work:
    """One request on one engine.

    kind   prefill, decode (with parameters), plain
    fate   finished, refused, failed, left, killed; "" while it lives
    """

    def __init__(self, request: Request, prompts: list[str]) -> None:
        self.request = request
        self.body: dict[str, Any] = request.body
        self.params: dict[str, Any] | None = self.body.get("kv_transfer_params")
        self.prompts = prompts
        self.wanted = wanted_tokens(request.path, self.body)
        self.cached = 0
        self.fate = ""
        self.kind = "plain"
        if self.params is not None:
            self.kind = "prefill" if self.params.get("do_remote_decode") else "decode"

    def __repr__(self) -> str:
        return f"<Work {self.kind} {self.fate or 'lives'}>"


class VllmEngine(EdgeServer):
    """See the module.

    works         all requests that it has had, in order
    hits          tokens that it got from prefills (vllm:external_prefix_cache_hits_total)
    moves         transfers of blocks (vllm:nixl_xfer_time_seconds_count)
    expired       leases that ended unread (vllm:nixl_num_kv_expired_reqs_total)
    recomputed    requests with parameters that had to compute the prompt after all: used twice, or too late
    dead_after    seconds after which a decode fails whose prefill cannot be reached (measured: 5.1)
    crashes_cold  whether the engine ends when its first work is a remote prefill
    pushes        whether a prefill looks for blocks by the id that the two requests have in common
    """

    def __init__(
        self,
        clock: Clock | None = None,
        lease: float = 30.0,
        dead_after: float = 5.1,
        token_secs: float = 0.0,
        model: str = "tiny",
        crashes_cold: bool = False,
        pushes: bool = False,
    ) -> None:
        super().__init__()
        self.clock = clock or Clock()
        self.lease = lease
        self.dead_after = dead_after
        self.token_secs = token_secs
        self.model = model
        self.crashes_cold = crashes_cold
        self.pushes = pushes
        self.side_port = free_port()
        self.id = str(uuid.uuid4())
        self.works: list[Work] = []
        self.hits = self.moves = self.expired = self.recomputed = 0
        self._held: dict[str, Held] = {}
        self._cache = PrefixCache()

    # -- what a test looks at ----------------------------------------------------------------------------

    @property
    def living(self) -> list[Work]:
        return [work for work in self.works if not work.fate]

    @property
    def held_blocks(self) -> int:
        """Return the blocks that wait for a decode now."""
        self._end_leases()
        return sum(held.blocks for held in self._held.values())

    def kinds(self) -> list[str]:
        """Return the kinds of all requests so far."""
        return [work.kind for work in self.works]

    def left(self) -> dict[str, int]:
        """Return what it still holds, without zeros. {} is idle."""
        return {name: n for name, n in (("requests", len(self.living)), ("blocks", self.held_blocks)) if n}

    # -- its life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        await super().start()
        self._listeners.append(self.listen(self._side_channel, self.side_port))

    def reset(self) -> None:
        for work in self.living:
            work.fate = "killed"
        self.id = str(uuid.uuid4())
        self.hits = self.moves = self.expired = self.recomputed = 0
        self._held.clear()
        self._cache.clear()

    def _end_leases(self) -> None:
        for name, held in list(self._held.items()):
            if held.until <= self.clock.now:
                del self._held[name]
                self.expired += 1

    # -- its endpoints -----------------------------------------------------------------------------------

    async def handle(self, request: Request, reply: Reply) -> None:
        if request.path in GENERATIVE:
            await self._generate(request, reply)
        elif request.path == "/health":
            await reply.whole(200)
        elif request.path == "/version":
            await reply.whole(200, {"version": "0.32.0"})
        elif request.path == "/v1/models":
            model = {"id": self.model, "object": "model", "owned_by": "vllm", "root": self.model, "max_model_len": 4096}
            await reply.whole(200, {"object": "list", "data": [model]})
        elif request.path == "/metrics":
            await reply.whole(200, self._metrics().encode())
        else:
            await reply.whole(404, {"detail": "Not Found"})

    def _metrics(self) -> str:
        self._end_leases()
        values = {
            "vllm:num_requests_running": len(self.living),
            "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": self.held_blocks / 512,
            "vllm:external_prefix_cache_hits_total": self.hits,
            "vllm:nixl_xfer_time_seconds_count": self.moves,
            "vllm:nixl_num_kv_expired_reqs_total": self.expired,
        }
        return "".join(f'{name}{{engine="0",model_name="{self.model}"}} {value}\n' for name, value in values.items())

    # -- one request -------------------------------------------------------------------------------------

    async def _generate(self, request: Request, reply: Reply) -> None:
        body = request.body
        try:
            work = Work(request, prompts_of(request.path, body)[0])
        except (KeyError, TypeError, AttributeError):
            await reply.whole(400, _error(400, "no prompt"))
            return
        self.works.append(work)
        self.wake()
        try:
            if samples_of(request.path, body) > 1 and body.get("temperature") == 0:
                raise VllmError(400, "n must be 1 when using greedy sampling")
            await self.at(Stage.RECEIVED)
            await self._serve_work(work, request, reply)
            work.fate = work.fate or "finished"
        except VllmError as error:
            work.fate = "refused" if error.status < 500 else "failed"
            await reply.whole(error.status, _error(error.status, error.message))
        finally:
            self.wake()

    async def _serve_work(self, work: Work, request: Request, reply: Reply) -> None:
        handed: dict[str, Any] | None = None
        if work.kind == "decode":
            await self._fetch(work, reply)
        else:
            work.cached = self._cache.cached(work.prompts[0])
        if work.kind == "prefill":
            handed = self._lease_blocks(work, request)
        await self.at(Stage.MOVED)
        await self._answer(work, reply, handed)

    def _lease_blocks(self, work: Work, request: Request) -> dict[str, Any]:
        """Hold the blocks of the first prompt, of one sample; return the parameters."""
        several = samples_of(request.path, work.body) > 1
        base = f"{'1_' if several else ''}{_base(request)}"
        name = f"{base}-{uuid.uuid4().hex[:8]}"
        count = tokens_of(work.prompts[0])
        blocks = -(-count // BLOCK)
        self._held[name] = Held(base, work.prompts[0], self.clock.now + self.lease, blocks)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(1, blocks + 1))],
            "remote_engine_id": self.id,
            "remote_request_id": name,
            "remote_host": "127.0.0.1",
            "remote_port": self.side_port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": count,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "push" if self.pushes else "pull",
            "remote_prefill_cached_tokens": work.cached,
        }

    async def _fetch(self, work: Work, reply: Reply) -> None:
        """Read the blocks of the prefill that the parameters name."""
        params = work.params or {}
        first = self.crashes_cold and len(self.works) == 1
        if first or any(params.get(name) is None for name in REMOTE):
            await reply.whole(500, _error(500, "EngineCore encountered an issue. See stack trace (above)."))
            work.fate = "failed"
            self.kill(flush=True)
            await asyncio.Event().wait()  # until that has ended this task
        await self.at(Stage.ADMITTED)
        try:
            wanted = {**params, "base": _base(work.request)} if self.pushes else params
            status, held = await ask(params["remote_host"], params["remote_port"], "POST", "/read", wanted)
        except OSError:
            await asyncio.sleep(self.dead_after)
            raise VllmError(500, "Internal server error") from None
        if status == 200:
            self.hits += held["tokens"]
            self.moves += 1
            work.prompts[0] = held["prompt"]
        else:
            self.recomputed += 1

    async def _side_channel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Let a decode read the blocks of one prefill, once, while they are leased."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            asked = (await read_request(reader)).body
            reply = Reply(reader, writer)
            self._end_leases()
            name = asked["remote_request_id"]
            if self.pushes:
                name = next((name for name, held in self._held.items() if held.base == asked["base"]), "")
            held = self._held.pop(name, None) if asked["remote_engine_id"] == self.id else None
            told = held and {"tokens": tokens_of(held.prompt), "prompt": held.prompt}
            await (reply.whole(200, told) if told else reply.whole(410, {}))
            self.wake()

    # -- answers -----------------------------------------------------------------------------------------

    async def _answer(self, work: Work, reply: Reply, handed: dict[str, Any] | None) -> None:
        path, count = work.request.path, work.wanted
        if not work.body.get("stream"):
            await asyncio.sleep(self.token_secs * count)
            choices = [
                {"index": index, "finish_reason": "length", **_said(path, answer_text(prompt, count), "message")}
                for index, prompt in enumerate(work.prompts)
            ]
            said = {"id": "cmpl", "model": self.model, "choices": choices, "usage": self._usage(work)}
            await reply.whole(200, {**said, "kv_transfer_params": handed})
            return
        await reply.stream()
        for number in range(count):
            for index, prompt in enumerate(work.prompts):
                last = "length" if number + 1 == count else None
                choice = {"index": index, "finish_reason": last, **_said(path, answer_token(prompt, number), "delta")}
                await reply.chunk(sse({"id": "cmpl", "model": self.model, "choices": [choice]}))
            if number == 0:
                await self.at(Stage.STREAMING)
            await asyncio.sleep(self.token_secs)
            if reply.gone:
                work.fate = "left"
                return
        if (work.body.get("stream_options") or {}).get("include_usage"):
            await reply.chunk(sse({"id": "cmpl", "model": self.model, "choices": [], "usage": self._usage(work)}))
        await reply.chunk(sse("[DONE]"))
        await reply.end()

    def _usage(self, work: Work) -> dict[str, Any]:
        prompt, made = sum(map(tokens_of, work.prompts)), work.wanted * len(work.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": work.cached},
        }


def _base(request: Request) -> str:
    """Return the name of a request without what makes it that of one engine."""
    return f"cmpl-{request.headers.get('x-request-id', '')}-0"


def _said(path: str, text: str, holder: str) -> dict[str, Any]:
    return {"text": text} if path == "/v1/completions" else {holder: {"role": "assistant", "content": text}}


def _error(status: int, message: str) -> dict[str, Any]:
    return {
        "error": {
            "message": message,
            "type": "InternalServerError" if status >= 500 else "BadRequestError",
            "code": status,
        }
    }


class VllmPair:
    """Prefill and decode engines on one clock, started together. vLLM's engines do not know their roles."""

    def __init__(self, prefills: int = 1, decodes: int = 1, **settings: Any) -> None:
        self.clock = Clock()
        self.prefills = [VllmEngine(self.clock, **settings) for _ in range(prefills)]
        self.decodes = [VllmEngine(self.clock, **settings) for _ in range(decodes)]
        self.prefill, self.decode = self.prefills[0], self.decodes[0]

    @property
    def engines(self) -> list[VllmEngine]:
        return [*self.prefills, *self.decodes]

    @property
    def flags(self) -> list[str]:
        """Return the router's flags for these engines."""
        words = ["--pd-disaggregation"]
        for engine in self.prefills:
            words += ["--prefill", engine.url]
        for engine in self.decodes:
            words += ["--decode", engine.url]
        return words

    async def start(self) -> None:
        for engine in self.engines:
            await engine.start()

    async def stop(self) -> None:
        for engine in self.engines:
            await engine.stop()

    async def idle(self) -> None:
        """Wait until no engine works. Blocks that nobody will read are freed at the end of their lease: now."""
        for engine in self.engines:
            try:
                await engine.until(lambda engine=engine: not engine.living)  # type: ignore[misc]
            except asyncio.TimeoutError:
                raise AssertionError(f"{engine.works} still work after {WITHIN} s") from None
        self.clock.now += self.prefill.lease
        assert not any(engine.left() for engine in self.engines)
