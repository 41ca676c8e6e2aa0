"""A fake SGLang engine of a prefill/decode pair: rooms, bootstrap server, admission window, deadlines, abort_request.

                 prefill                                                decode
    queued       waits for a decode with its room                       waits for one of `window` places
    admitted     the decode has come: computes the prompt               asks the bootstrap server of its prefill for the
                                                                        room, over a real connection
    moved        the KV cache is handed over: answers one token         has the KV cache: answers all tokens

What a router must live with: a leg that waits is freed by `POST /abort_request` and by its deadline, by nothing else;
the end of one leg tells the other nothing; a chat with `n` above 1 hangs decode and keeps its tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
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

GENERATIVE = ("/generate", "/v1/completions", "/v1/chat/completions")
HEALTH_HOST = "2.2.2.2"
"""A leg with this bootstrap host has no other leg: engines check their own health so."""
DEFAULT_BOOTSTRAP_PORT = 8998
HAS_IT = b"+"
"""What a decode says when the KV cache has arrived."""
OVERRIDES = {"bootstrap_host": str, "bootstrap_port": int, "bootstrap_room": int, "rid": str}


class Timing(NamedTuple):
    """How long an engine takes to notice, in seconds; `scaled` makes all of them shorter."""

    handshake: float = 14.0
    """A decode whose prefill cannot be reached fails after this."""
    lost: float = 11.0
    """A leg whose other engine died fails after this (measured: 9 to 14)."""
    bootstrap: float = 300.0
    """A prefill leg waits this long for its decode."""
    waiting: float = 300.0
    """A decode leg waits this long for its prefill."""
    token: float = 0.0
    """From one token to the next."""

    def scaled(self, factor: float) -> Timing:
        return Timing(*(value * factor for value in self))


class EngineError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Moved(NamedTuple):
    """What a decode gets of a prefill: stands for the KV cache."""

    prompt: str
    cached: int


class Leg:
    """One request on one engine.

    batch   whether the answer of /generate is a list
    rids    its names, one for each entry of a batch; only these can be aborted
    rooms   one for each entry
    state   queued, admitted, running, stuck
    fate    how it ended: finished, aborted, failed, left, killed; "" while it lives
    error   what it failed with: it had to find that out by itself
    used    tokens of the KV cache that it holds
    """

    def __init__(self, request: Request, prompts: list[str], batch: bool, rids: list[str], rooms: list[int]) -> None:
        self.request = request
        self.batch = batch
        self.body: dict[str, Any] = request.body
        self.prompts = prompts
        self.rids = rids
        self.rooms = rooms
        self.wanted = wanted_tokens(request.path, self.body)
        self.streams = bool(self.body.get("stream"))
        self.state = "queued"
        self.fate = ""
        self.error = ""
        self.used = 0
        self.cached: list[int] = []
        self.task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Leg {self.rids} rooms {self.rooms} {self.fate or self.state}>"


class Meeting:
    """One room of a prefill: its leg is there, or a decode has come, or both."""

    def __init__(self) -> None:
        self.decode: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.kv: asyncio.Future[Moved] = asyncio.get_running_loop().create_future()
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.leg: Leg | None = None


class SglangEngine(EdgeServer):
    """See the module.

    legs       all requests that it has had, in order
    most       the highest number of legs that a decode had at once; more than `window` is the router's mistake
    """

    def __init__(
        self,
        role: str,
        window: int = 8,
        timing: Timing | None = None,
        model: str = "tiny",
        header_overrides: bool = False,
    ) -> None:
        super().__init__()
        self.role = role
        self.window = window
        self.timing = timing or Timing()
        self.model = model
        self.header_overrides = header_overrides
        self.bootstrap_port = free_port()
        self.legs: list[Leg] = []
        self.most = 0
        self._cache = PrefixCache()
        self._rooms: dict[int, Meeting] = {}
        self._places = asyncio.Semaphore(window)

    # -- what a test looks at ----------------------------------------------------------------------------

    @property
    def living(self) -> list[Leg]:
        return [leg for leg in self.legs if not leg.fate]

    @property
    def fates(self) -> list[str]:
        return [leg.fate or leg.state for leg in self.legs]

    @property
    def used_tokens(self) -> int:
        return sum(leg.used for leg in self.living)

    def left(self) -> dict[str, int]:
        """Return what the engine still holds: its queues, its requests and tokens, without zeros. {} is idle."""
        load = self._load()
        counts = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")}
        counts |= {name: n for name, n in load["disaggregation"].items() if name.endswith("_reqs")}
        return {name: n for name, n in counts.items() if n}

    def switch(self, role: str) -> None:
        self.role = role

    # -- its life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        await super().start()
        self._listeners.append(self.listen(self._bootstrap, self.bootstrap_port))

    def reset(self) -> None:
        for leg in self.living:
            leg.fate = "killed"
        self._rooms.clear()
        self._cache.clear()
        self._places = asyncio.Semaphore(self.window)

    # -- its endpoints -----------------------------------------------------------------------------------

    async def handle(self, request: Request, reply: Reply) -> None:
        if request.path in GENERATIVE:
            await self._generate(request, reply)
        elif request.path == "/abort_request":
            self._abort_request(request.body or {})
            await reply.whole(200)
        elif request.path == "/pd_role_switch":
            await self._switch_role(request, reply)
        elif (answer := self._about(request)) is not None:
            await reply.whole(200, answer)
        else:
            await reply.whole(404, {"detail": "Not Found"})

    def _about(self, request: Request) -> Any:
        """Return what the engine says of itself, None if the path is unknown."""
        if request.path in ("/health", "/health_generate"):
            return b""
        if request.path in ("/server_info", "/get_server_info"):
            return self._server_info()
        if request.path in ("/model_info", "/get_model_info"):
            return {"model_path": self.model, "is_generation": True}
        if request.path == "/v1/models":
            model = {
                "id": self.model,
                "object": "model",
                "owned_by": "sglang",
                "root": self.model,
                "max_model_len": 8192,
            }
            return {"object": "list", "data": [model]}
        if request.path == "/v1/loads":
            return {"loads": [self._load()], "version": "0.5.23"}
        if request.path == "/flush_cache":
            self._cache.clear()
            return b"Cache flushed.\n"
        return None

    def _server_info(self) -> dict[str, Any]:
        return {
            "served_model_name": self.model,
            "version": "0.5.23",
            "disaggregation_mode": self.role,
            "disaggregation_bootstrap_port": self.bootstrap_port,
            "disaggregation_transfer_backend": "mooncake_tcp",
            "max_running_requests": self.window,
            "dp_size": 1,
            "context_length": 8192,
            "max_total_num_tokens": 16384,
        }

    def _load(self) -> dict[str, Any]:
        states = [leg.state for leg in self.living]
        queues = dict.fromkeys(
            (
                *("prefill_bootstrap_queue_reqs", "prefill_inflight_queue_reqs", "decode_prealloc_queue_reqs"),
                *("decode_transfer_queue_reqs", "decode_retracted_queue_reqs"),
            ),
            0,
        )
        first, second = {
            "prefill": ("prefill_bootstrap_queue_reqs", "prefill_inflight_queue_reqs"),
            "decode": ("decode_prealloc_queue_reqs", "decode_transfer_queue_reqs"),
        }[self.role]
        queues[first], queues[second] = states.count("queued"), states.count("admitted")
        return {
            "dp_rank": 0,
            "num_running_reqs": states.count("running"),
            "num_waiting_reqs": states.count("stuck"),
            "num_used_tokens": self.used_tokens,
            "num_total_tokens": self.used_tokens,
            "max_total_num_tokens": 16384,
            "max_running_requests": self.window,
            "disaggregation": {
                "mode": self.role,
                "kv_transfer_speed_gb_s": 0.0,
                "kv_transfer_latency_ms": 0.0,
                **queues,
            },
        }

    async def _switch_role(self, request: Request, reply: Reply) -> None:
        """Change the role; the engine must be idle."""
        wanted, old = str((request.body or {}).get("new_role")), self.role
        success = wanted in ("prefill", "decode") and not self.living
        if success:
            self.switch(wanted)
        message = "" if success else "the instance must be idle"
        answer = {"success": success, "message": message, "old_role": old, "new_role": self.role}
        await reply.whole(200 if success else 400, answer)

    def _abort_request(self, body: dict[str, Any]) -> None:
        """End legs by a name, at once. The name of a batch is none: its entries have names of their own."""
        for leg in self.living:
            if body.get("abort_all") or (leg.state != "stuck" and body.get("rid") in leg.rids):
                leg.fate = "aborted"
                if leg.task is not None:
                    leg.task.cancel()
        self.wake()

    # -- one leg -----------------------------------------------------------------------------------------

    async def _generate(self, request: Request, reply: Reply) -> None:
        try:
            leg = self._leg(request)
        except EngineError as error:
            await reply.whole(error.status, {"error": {"message": error.message}})
            return
        self.legs.append(leg)
        self.most = max(self.most, len(self.living))
        self.wake()
        leg.task = asyncio.current_task()
        try:
            await (self._prefill if self.role == "prefill" else self._decode)(leg, reply)
            leg.fate = leg.fate or "finished"
        except asyncio.CancelledError:
            if leg.fate != "aborted":
                raise
            await self._fail(reply, EngineError(500, f"Request {leg.rids[0]} was aborted: Aborted by AbortReq."))
        except EngineError as error:
            leg.fate, leg.error = "failed", error.message
            await self._fail(reply, error)
        finally:
            self._rooms = {room: meeting for room, meeting in self._rooms.items() if meeting.leg is not leg}
            self.wake()

    async def _fail(self, reply: Reply, error: EngineError) -> None:
        what = {"error": {"message": error.message, "type": "InternalServerError", "code": error.status}}
        if reply.begun:
            await reply.chunk(sse(what))
            await reply.end()
        else:
            await reply.whole(error.status, what)

    def _leg(self, request: Request) -> Leg:
        body = request.body
        if not isinstance(body, dict):
            raise EngineError(400, "the body is no JSON object")
        if self.header_overrides:
            body |= _overridden(request.headers)
        try:
            prompts, batch = prompts_of(request.path, body)
        except (KeyError, TypeError):
            raise EngineError(400, "no prompt") from None
        count = len(prompts)
        rid = body.get("rid") or f"own-{len(self.legs)}"
        rids = rid if isinstance(rid, list) else [f"{rid}_{i}" for i in range(count)] if batch else [rid]
        if len(rids) != count or len(set(rids)) != count:
            raise EngineError(400, "The specified rids length mismatch with the batch_size for batch processing.")
        room = body.get("bootstrap_room")
        if room is None:
            message = "Disaggregated request received without bootstrap room id."
            raise EngineError(400, f"Invalid request: {message} req.rid='{rids[0]}'")
        rooms = room if isinstance(room, list) else [room + i for i in range(count)]
        if len(rooms) != count:
            raise EngineError(400, "The length of bootstrap_room should be equal to the batch size.")
        leg = Leg(request, prompts, batch, rids, rooms)
        leg.body = body
        return leg

    def _meeting(self, room: int) -> Meeting:
        return self._rooms.setdefault(room, Meeting())

    # -- prefill -----------------------------------------------------------------------------------------

    async def _prefill(self, leg: Leg, reply: Reply) -> None:
        leg.cached = [self._cache.cached(prompt) for prompt in leg.prompts]
        if samples_of(leg.request.path, leg.body) > 1:  # its decode never comes, and it answers all the same
            await self._answer(leg, reply, 1)
            return
        await self.at(Stage.RECEIVED)
        if leg.body.get("bootstrap_host") != HEALTH_HOST:
            meetings = [self._meeting(room) for room in leg.rooms]
            if any(meeting.leg for meeting in meetings):
                raise EngineError(500, f"KVTransferError(bootstrap_room={leg.rooms[0]}): the room is in use")
            for meeting in meetings:
                meeting.leg = leg
            await self._meet(leg, meetings)
        await self._answer(leg, reply, 1)

    async def _meet(self, leg: Leg, meetings: list[Meeting]) -> None:
        """Wait for the decode, and hand over."""
        if not await _all_done([meeting.decode for meeting in meetings], self.timing.bootstrap):
            waited = f"timed out after {self.timing.bootstrap:g}s in KVPoll.Bootstrapping"
            raise EngineError(500, f"Request {leg.rids[0]} {waited}")
        leg.state, leg.used = "admitted", sum(map(tokens_of, leg.prompts))
        self.wake()
        await self.at(Stage.ADMITTED)
        for meeting, prompt, cached in zip(meetings, leg.prompts, leg.cached, strict=True):
            if meeting.taken.done():  # the decode died meanwhile
                break
            meeting.kv.set_result(Moved(prompt, cached))
        await asyncio.wait([meeting.taken for meeting in meetings])
        if any(meeting.taken.exception() for meeting in meetings):
            await asyncio.sleep(self.timing.lost)
            raise EngineError(500, f"Prefill transfer failed for request {leg.rids[0]}: lost connection")
        await self.at(Stage.MOVED)

    async def _bootstrap(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the bootstrap port; a decode asks there for the KV cache of a room, and waits for it."""
        reply = Reply(reader, writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            request = await read_request(reader)
            if request.path == "/kv":
                await self._hand_over(request.body, reply, reader)
            elif request.path in ("/route", "/health"):
                await reply.whole(200, {"prefill_http_port": self.port})
            else:
                await reply.whole(404, {})

    async def _hand_over(self, asked: dict[str, Any], reply: Reply, reader: asyncio.StreamReader) -> None:
        meeting = self._meeting(asked["room"])
        if meeting.decode.done():
            await reply.whole(409, {"why": "the room is in use"})
            if not meeting.taken.done():
                meeting.taken.set_exception(ConnectionResetError("two decodes in one room"))
                meeting.taken.exception()  # it may be that nobody waits for it
            return
        meeting.decode.set_result(asked["decode"])
        said = asyncio.ensure_future(reader.read(1))
        await asyncio.wait((said, meeting.kv), return_when=asyncio.FIRST_COMPLETED)
        if not said.done():
            await reply.whole(200, meeting.kv.result()._asdict())
            await asyncio.wait((said,))
        has_it = said.exception() is None and said.result() == HAS_IT
        if meeting.taken.done():
            return
        if has_it:
            meeting.taken.set_result(None)
        else:
            meeting.taken.set_exception(ConnectionResetError("the decode is gone"))
            meeting.taken.exception()

    # -- decode ------------------------------------------------------------------------------------------

    async def _decode(self, leg: Leg, reply: Reply) -> None:
        await self.at(Stage.RECEIVED)
        if samples_of(leg.request.path, leg.body) > 1:
            leg.state, leg.used = "stuck", sum(map(tokens_of, leg.prompts))
            self.wake()
            await asyncio.Event().wait()
        async with self._places:
            if leg.body.get("bootstrap_host") == HEALTH_HOST:
                leg.cached = [0] * len(leg.prompts)
            else:
                await self._fetch(leg)
            leg.state = "running"
            leg.used += leg.wanted * len(leg.prompts)
            self.wake()
            await self.at(Stage.MOVED)
            await self._answer(leg, reply, leg.wanted)

    async def _fetch(self, leg: Leg) -> None:
        """Get the KV cache of each entry from its prefill."""
        places = [_each(leg.body.get(name), len(leg.rooms)) for name in ("bootstrap_host", "bootstrap_port")]
        peers = [(str(host), int(port or DEFAULT_BOOTSTRAP_PORT)) for host, port in zip(*places, strict=True)]
        for host, port in peers:
            try:
                await ask(host.strip("[]"), port, "GET", "/route")
            except OSError:
                await asyncio.sleep(self.timing.handshake)
                raise EngineError(500, f"Decode handshake failed for request {leg.rids[0]}") from None
        leg.state, leg.used = "admitted", sum(map(tokens_of, leg.prompts))
        self.wake()
        await self.at(Stage.ADMITTED)
        moves = [asyncio.ensure_future(self._move(*each)) for each in zip(peers, leg.rooms, strict=True)]
        try:
            if not await _all_done(moves, self.timing.waiting):
                waited = f"timed out after {self.timing.waiting:g}s in KVPoll.WaitingForInput"
                raise EngineError(500, f"Request {leg.rids[0]} {waited}")
            moved = [move.result() for move in moves]
        finally:
            for move in moves:
                move.cancel()
        leg.prompts = [each.prompt for each in moved]
        leg.cached = [each.cached for each in moved]

    async def _move(self, peer: tuple[str, int], room: int) -> Moved:
        host, port = peer
        try:
            status, kv = await ask(host.strip("[]"), port, "POST", "/kv", {"room": room, "decode": self.url}, HAS_IT)
        except OSError:
            await asyncio.sleep(self.timing.lost)
            why = f"Lost connection with prefill instance (bootstrap_addr: {host}:{port})"
            raise EngineError(500, f"Decode transfer failed for request: {why}") from None
        if status != 200:
            raise EngineError(500, f"Decode transfer failed for request: {kv['why']} (bootstrap_room={room})")
        return Moved(**kv)

    # -- answers -----------------------------------------------------------------------------------------

    async def _answer(self, leg: Leg, reply: Reply, count: int) -> None:
        if not leg.streams:
            await asyncio.sleep(self.timing.token * count)
            await reply.whole(200, self._whole(leg, count))
            return
        await reply.stream()
        for number in range(count):
            for entry, prompt in enumerate(leg.prompts):
                await reply.chunk(sse(self._event(leg, entry, prompt, number, count)))
            if number == 0 and self.role == "decode":
                await self.at(Stage.STREAMING)
            await asyncio.sleep(self.timing.token)
            if reply.gone:  # an engine notices when it has something to send
                leg.fate = "left"
                return
        if (leg.body.get("stream_options") or {}).get("include_usage"):
            await reply.chunk(
                sse({"id": leg.rids[0], "model": self.model, "choices": [], "usage": self._usage(leg, count)})
            )
        await reply.chunk(sse("[DONE]"))
        await reply.end()

    def _usage(self, leg: Leg, count: int) -> dict[str, Any]:
        prompt, made = sum(map(tokens_of, leg.prompts)), count * len(leg.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(leg.cached)},
        }

    def _whole(self, leg: Leg, count: int) -> Any:
        if leg.request.path == "/generate":
            answers = [self._generated(leg, entry, prompt, count, count) for entry, prompt in enumerate(leg.prompts)]
            return answers if leg.batch else answers[0]
        choices = [
            {"index": index, "finish_reason": "length", **self._said(leg, answer_text(prompt, count), "message")}
            for index, prompt in enumerate(leg.prompts)
        ]
        return {"id": leg.rids[0], "model": self.model, "choices": choices, "usage": self._usage(leg, count)}

    def _event(self, leg: Leg, entry: int, prompt: str, number: int, count: int) -> dict[str, Any]:
        if leg.request.path == "/generate":  # each event has the whole text so far
            return {**self._generated(leg, entry, prompt, number + 1, count), "index": entry}
        said = self._said(leg, answer_token(prompt, number), "delta")
        choice = {"index": entry, "finish_reason": "length" if number + 1 == count else None, **said}
        return {"id": leg.rids[0], "model": self.model, "choices": [choice]}

    def _said(self, leg: Leg, text: str, holder: str) -> dict[str, Any]:
        if leg.request.path == "/v1/completions":
            return {"text": text}
        return {holder: {"role": "assistant", "content": text}}

    def _generated(self, leg: Leg, entry: int, prompt: str, made: int, count: int) -> dict[str, Any]:
        """Return an answer of /generate. Prefill alone has the log probabilities of the prompt."""
        about: dict[str, Any] = {
            "id": leg.rids[entry],
            "finish_reason": {"type": "length", "length": count} if made == count else None,
            "prompt_tokens": tokens_of(prompt),
            "completion_tokens": made,
            "cached_tokens": leg.cached[entry],
        }
        if leg.body.get("return_logprob"):
            own = self.role == "prefill"
            about["input_token_logprobs"] = [[-0.5, n, None] for n in range(tokens_of(prompt))] if own else []
            about["output_token_logprobs"] = [[-0.25, n, None] for n in range(made)]
        return {"text": answer_text(prompt, made), "meta_info": about}


async def _all_done(futures: Sequence[asyncio.Future[Any]], within: float) -> bool:
    """Wait for all; whether they are done in time. Raises: what the first that failed has raised. Cancels none."""
    done, left = await asyncio.wait(futures, timeout=within, return_when=asyncio.FIRST_EXCEPTION)
    for each in done:
        each.result()
    return not left


def _each(value: Any, count: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * count


def _overridden(headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that headers set (SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES)."""
    fields = {}
    for field, kind in OVERRIDES.items():
        name = f"x-override-{field.replace('_', '-')}"
        if (value := headers.get(name)) is not None:
            try:
                fields[field] = kind(value)
            except ValueError:
                raise EngineError(400, f"invalid {name} header '{value}'") from None
    return fields


class SglangPair:
    """Prefill and decode engines, started together.

    prefills, decodes  the engines
    prefill, decode    the first of each
    """

    def __init__(self, prefills: int = 1, decodes: int = 1, **settings: Any) -> None:
        self.prefills = [SglangEngine("prefill", **settings) for _ in range(prefills)]
        self.decodes = [SglangEngine("decode", **settings) for _ in range(decodes)]
        self.prefill, self.decode = self.prefills[0], self.decodes[0]

    @property
    def engines(self) -> list[SglangEngine]:
        return [*self.prefills, *self.decodes]

    @property
    def flags(self) -> list[str]:
        """Return the router's flags for these engines."""
        words = ["--pd-disaggregation"]
        for engine in self.prefills:
            words += ["--prefill", engine.url, str(engine.bootstrap_port)]
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
        """Wait until no engine holds anything."""
        for engine in self.engines:
            try:
                await engine.until(lambda engine=engine: not engine.left())  # type: ignore[misc]
            except asyncio.TimeoutError:
                raise AssertionError(f"{engine.role} still has {engine.left()} after {WITHIN} s") from None
