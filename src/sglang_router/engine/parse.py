"""Turn request bodies into jobs: one function per protocol, the same checks for all.

Each function takes the decoded JSON object and returns a `ParsedBody`: the jobs (one per prompt and choice), and
whether to stream the answer. A mistake of the client raises `EngineError` with status 400 and a message that names the
field.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang_router.engine.runner import EngineError, EngineJob
from sglang_router.engine.text import Tokenizer, content_text, render_chat

Body = dict[str, Any]

GENERATE_LIMIT = 128  # SGLang's default for /generate
COMPLETION_LIMIT = 16  # OpenAI's for /v1/completions


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """The content of a request. `many`: the prompt was a list, so the answer is a list; `choices` is n."""

    jobs: list[EngineJob]
    stream: bool
    model: str
    body: Body
    many: bool = False
    choices: int = 1
    include_usage: bool = False


def read_object(raw: bytes) -> Body:
    """Return the JSON object in `raw`."""
    try:
        body = _decoded(raw)
    except (ValueError, RecursionError) as error:
        raise EngineError(400, f"The body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise EngineError(400, "The body is not a JSON object.")
    return body


def _decoded(raw: bytes) -> Any:
    """Decode JSON as tolerantly as other Python engines; lone surrogates become U+FFFD, for the tokenizer."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = json.dumps(json.loads(raw), ensure_ascii=False).encode("utf-8", "surrogatepass")
        return json.loads(text.decode("utf-8", "replace"))


def need(body: Body, name: str, kind: type | tuple[type, ...]) -> Any:
    """Return the field `name`, which must be present and of that type."""
    value = body.get(name)
    if value is None:
        raise EngineError(400, f"The field {name!r} is missing.")
    if not isinstance(value, kind):
        raise EngineError(400, f"The field {name!r} has the wrong type.")
    return value


class BodyParser:
    """Parses bodies with one tokenizer. `context` is in tokens; `model` is the name for requests without one.

    `ranks` is the number of data-parallel ranks. They share one scheduler, but each has a cache of its own.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, model: str, ranks: int = 1) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.model = model
        self.ranks = ranks
        self._turns = itertools.cycle(range(ranks))
        self.kinds: dict[str, Callable[[Body], ParsedBody]] = {
            "generate": self.generate,
            "chat": self.chat,
            "completions": self.completions,
            "responses": self.responses,
            "messages": self.messages,
        }

    # -- one function per protocol -------------------------------------------------------------------------

    def generate(self, body: Body) -> ParsedBody:
        """Parse SGLang's own format: `text` or `input_ids`, one or a list."""
        given = body.get("input_ids") if body.get("text") is None else body["text"]
        if given is None:
            raise EngineError(400, "Give either 'text' or 'input_ids'.")
        prompts, many = self.prompts(given, "text or input_ids")
        sampling = body.get("sampling_params") or {}
        each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        if len(each) != len(prompts) or not all(isinstance(one, dict) for one in each):
            raise EngineError(400, "'sampling_params' must be an object, or a list with one for each prompt.")
        rids = body.get("rid") or ""
        if isinstance(rids, str):
            rids = [f"{rids}_{at}" if rids and many else rids for at in range(len(prompts))]
        if not isinstance(rids, list) or len(rids) != len(prompts):
            raise EngineError(400, "'rid' must be a string, or a list with one for each prompt.")
        jobs = []
        for prompt, one, rid in zip(prompts, each, rids, strict=True):
            limit = _whole(one, "max_new_tokens", GENERATE_LIMIT, least=0)
            seed = _whole(one, "sampling_seed", 0)
            jobs.append(self._job(prompt, one, limit, self._namespace(body), seed, rid=str(rid)))
        return self._parsed(body, jobs, many=many)

    def chat(self, body: Body) -> ParsedBody:
        """Parse OpenAI's chat: `messages`, with `tools` before them as in the chat template."""
        messages = need(body, "messages", list)
        if not messages:
            raise EngineError(400, "The field 'messages' is empty.")
        go_on = bool(body.get("continue_final_message"))
        text = render_chat(messages, body.get("tools"), go_on=go_on)
        prompt = self.tokenizer.encode(text)
        limit = _whole(body, "max_completion_tokens", None) or _whole(body, "max_tokens", None) or self._room(prompt)
        return self._choices(body, [prompt], limit)

    def completions(self, body: Body) -> ParsedBody:
        """Parse OpenAI's completions: `prompt` as text, token ids, or a list of either."""
        prompts, many = self.prompts(need(body, "prompt", (str, list)), "prompt")
        return self._choices(body, prompts, _whole(body, "max_tokens", COMPLETION_LIMIT), many=many)

    def responses(self, body: Body) -> ParsedBody:
        """Parse OpenAI's responses: `input` as text or items, with `instructions` before it."""
        given = need(body, "input", (str, list))
        messages: list[Any] = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
        if body.get("instructions"):
            messages.insert(0, {"role": "system", "content": body["instructions"]})
        prompt = self.tokenizer.encode(render_chat(messages, body.get("tools")))
        limit = _whole(body, "max_output_tokens", None) or self._room(prompt)
        return self._choices(body, [prompt], limit)

    def messages(self, body: Body) -> ParsedBody:
        """Parse Anthropic's messages: `messages`, with `system` before them."""
        messages = list(need(body, "messages", list))
        if not messages:
            raise EngineError(400, "The field 'messages' is empty.")
        if body.get("system"):
            messages.insert(0, {"role": "system", "content": content_text(body["system"])})
        need(body, "max_tokens", int)
        prompt = self.tokenizer.encode(render_chat(messages, body.get("tools")))
        stop = {"stop": body.get("stop_sequences")}
        return self._choices(body, [prompt], _whole(body, "max_tokens", 1), sampling=body | stop)

    # -- shared --------------------------------------------------------------------------------------------

    def prompts(self, given: Any, field: str) -> tuple[list[list[int]], bool]:
        """Return the prompts, given as text or token ids, one or a list; and whether it was a list."""
        if isinstance(given, str):
            return [self.tokenizer.encode(given)], False
        if isinstance(given, list) and given:
            if all(isinstance(item, str) for item in given):
                return [self.tokenizer.encode(item) for item in given], True
            if _token_ids(given):
                return [given], False
            if all(isinstance(item, list) and item and _token_ids(item) for item in given):
                return given, True
        raise EngineError(400, f"The field {field!r} must be a text, token ids, or a list of either, and not empty.")

    def _choices(
        self,
        body: Body,
        prompts: list[list[int]],
        limit: int,
        *,
        many: bool = False,
        sampling: Body | None = None,
    ) -> ParsedBody:
        """Return jobs in OpenAI's order: first all choices of the first prompt. Each choice has its own seed."""
        choices = _whole(body, "n", 1)
        seed = _whole(body, "seed", 0, least=None)
        space = self._namespace(body)
        rid = str(body.get("rid") or "")
        jobs: list[EngineJob] = []
        for prompt in prompts:
            for choice in range(choices):
                own_rid = f"{rid}_{len(jobs)}" if rid and len(prompts) * choices > 1 else rid
                jobs.append(self._job(prompt, sampling or body, limit, space, seed + choice, rid=own_rid))
        return self._parsed(body, jobs, many=many, choices=choices)

    def _parsed(self, body: Body, jobs: list[EngineJob], **more: Any) -> ParsedBody:
        options = body.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        model = str(body.get("model") or self.model)
        return ParsedBody(jobs, bool(body.get("stream")), model, body, include_usage=usage, **more)

    def _job(self, prompt: list[int], sampling: Body, limit: int, namespace: str, seed: int, *, rid: str) -> EngineJob:
        stop = sampling.get("stop") or ()
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        stop_tokens = tuple(sampling.get("stop_token_ids") or ())
        if not all(isinstance(one, str) for one in stops) or not all(isinstance(one, int) for one in stop_tokens):
            raise EngineError(400, "'stop' must be a text or a list of texts, and 'stop_token_ids' a list of numbers.")
        temperature = sampling.get("temperature")
        if temperature is not None and (not isinstance(temperature, (int, float)) or temperature < 0):
            raise EngineError(400, "'temperature' must be a number, 0 or more.")
        ignore_eos = bool(sampling.get("ignore_eos"))
        return EngineJob(prompt, limit, rid, namespace, stops, stop_tokens, ignore_eos, seed & 0xFFFFFFFF)

    def _room(self, prompt: list[int]) -> int:
        return max(self.context - len(prompt), 1)

    def _namespace(self, body: Body) -> str:
        """Return what separates the caches of requests: rank, adapter, salt, extra key."""
        _, _, adapter = str(body.get("model") or "").partition(":")
        parts = (body.get("lora_path") or adapter, body.get("cache_salt"), body.get("extra_key"))
        rest = "\0".join(str(part or "") for part in parts) if any(parts) else ""
        return rest if self.ranks == 1 else f"{self._rank(body)}\0{rest}"

    def _rank(self, body: Body) -> int:
        rank = _whole(body, "data_parallel_rank", None, least=0)
        if rank is None:
            return next(self._turns)
        if rank >= self.ranks:
            raise EngineError(400, f"'data_parallel_rank' must be below {self.ranks}.")
        return int(rank)


def _token_ids(items: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 1 << 32 for item in items)


def _whole(body: Body, name: str, default: Any, least: int | None = 1) -> Any:
    """Return the whole number in field `name`, at least `least`; `default` if it is missing."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or (least is not None and value < least):
        raise EngineError(
            400,
            f"The field {name!r} must be a whole number" + ("." if least is None else f", {least} or more."),
        )
    return value
