"""Decide how another worker continues a stream whose worker died.

    refusal(endpoint, body)              when the request arrives: why its stream could not be continued
    Generation.read(events)              after the break: what the client was sent               (resume.generation)
    go_on(endpoint, body, generation)    -> Next: the body for another worker, or the events that are still missing,
                                            or why the stream cannot be continued

The next worker is asked to continue the text: the text is appended to the prompt, or becomes the last message of the
chat, which the engine is told to continue. Where prompt and stream are token ids, the ids are appended. The token limit
is reduced by the tokens written so far; every other value of the body stays byte for byte.

The result equals what one worker would have written only if each token depends on the tokens before it and on nothing
else. Everything else is refused, with one of the `REASONS` (explained in docs/resume.md).
"""

from __future__ import annotations

import msgspec

from sglang_router.resume.chunks import ChatChunks, Chunks
from sglang_router.resume.cumulative import Snapshots
from sglang_router.resume.generation import ABSENT, Fields, Generation, encode, fields_of
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.trail import MOST_BREAKS
from sglang_router.wire.gathering import Body

GENERATIONS: dict[str, type[Generation]] = {"generate": Snapshots, "chat": ChatChunks, "completions": Chunks}
"""How a stream is read, by the name of its endpoint; streams of other endpoints are not continued."""

REASONS = {
    "endpoint": "streams of this endpoint are not continued",
    "large": "a request body above 512 kB, which is not decoded",
    "choices": "several prompts or several choices",
    "sampling": "the temperature is not 0, or penalties depend on what was written",
    "structured": "the answer must follow a grammar or schema, or must be a tool call",
    "logprobs": "log probabilities",
    "prompt": "a prompt that cannot be appended to",
    "no_limit": "a completion without max_tokens, whose limit only the engine knows",
    "tool_call": "a tool call has begun",
    "other_content": "something other than text was written, such as reasoning",
    "stop_begun": "the text ends with the beginning of a stop string",
    "no_token_ids": "the prompt is token ids, and the stream contains none",
    "too_long": "more text than --resume-max-bytes",
    "unreadable": "the body or the worker's events cannot be parsed",
    "no_progress": "two workers broke at the same token",
    "no_retry": "no worker is left, or no retry",
}
"""Why a stream is not continued: the label of sgl_router_resume_refused_total, and its meaning."""

GENERATE_LIMIT = 128
"""SGLang's token limit for a /generate that sets none."""
_MUST_BE_ABSENT = {
    "use_beam_search": "choices",
    "logprobs": "logprobs",
    "prompt_logprobs": "logprobs",
    "return_logprob": "logprobs",
    "return_hidden_states": "logprobs",
    "echo": "prompt",
    "suffix": "prompt",
    "input_embeds": "prompt",
    "prompt_embeds": "prompt",
    "session_params": "prompt",
    "truncate_prompt_tokens": "prompt",
    **dict.fromkeys(("regex", "ebnf", "json_schema", "structural_tag", "structured_outputs", "grammar"), "structured"),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "structured"),
}
_MUST_BE_NUMBER = {
    "n": (1, "choices"),
    "best_of": (1, "choices"),
    "frequency_penalty": (0, "sampling"),
    "presence_penalty": (0, "sampling"),
    "repetition_penalty": (1, "sampling"),
}
_LIMITS = {
    "generate": ("max_new_tokens", "min_new_tokens"),
    "chat": ("max_completion_tokens", "max_tokens", "n_predict", "min_tokens"),
    "completions": ("max_tokens", "n_predict", "min_tokens"),
}
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class ResumeRules(msgspec.Struct, frozen=True):
    """The options of resuming.

    max_bytes     most bytes of text kept for one stream
    any_sampling  also continue sampled text, which another worker writes differently
    """

    max_bytes: int = 1 << 20
    any_sampling: bool = False


class _Typed(msgspec.Struct):
    """`response_format`."""

    type: str = ""


class _Options(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None


class Next(msgspec.Struct, frozen=True):
    """What to do after a break.

    refused  why the stream cannot be continued, a key of REASONS; "" when it can
    events   what the router itself sends to the client, as the JSON of their data
    body     the request for another worker, whose events follow these; b"" when these are the end
    """

    refused: str = ""
    events: tuple[bytes, ...] = ()
    body: bytes = b""


# -- the request -------------------------------------------------------------------------------------------------------


def refusal(endpoint: Endpoint, body: Body, rules: ResumeRules) -> str:
    """Return why the stream that `body` requests could not be continued, a key of `REASONS`; "" when it could."""
    if endpoint.name not in GENERATIONS:
        return "endpoint"
    try:
        fields = fields_of(body)
        sampling = _sampling(endpoint, fields)
        return _structured(fields) or _refused(fields | sampling, rules) or _unfit(endpoint, fields)
    except _MALFORMED:
        return "unreadable"


def _sampling(endpoint: Endpoint, fields: Fields) -> Fields:
    """Return the object with the sampling parameters."""
    if endpoint.name != "generate":
        return fields
    raw = fields.get("sampling_params")
    return {} if raw is None or bytes(raw) in ABSENT else fields_of(raw)


def _structured(fields: Fields) -> str:
    """Return "structured" when the answer must follow a schema or be a tool call; else ""."""
    raw = fields.get("response_format")
    if raw is not None and bytes(raw) not in ABSENT and msgspec.json.decode(raw, type=_Typed).type != "text":
        return "structured"
    tools = fields.get("tools")
    if tools is None or bytes(tools) in ABSENT:
        return ""
    free = (b"null", b'"none"', b'"auto"')
    return "" if bytes(fields.get("tool_choice", b"null")) in free else "structured"


def _refused(fields: Fields, rules: ResumeRules) -> str:
    """Return the reason why a field of the body, or of its sampling parameters, prevents resuming; "" for none."""
    for name, raw in fields.items():
        reason = _MUST_BE_ABSENT.get(name, "")
        if reason and bytes(raw) not in ABSENT:
            return reason
        number, reason = _MUST_BE_NUMBER.get(name, (0, ""))
        if reason and bytes(raw) != b"null" and msgspec.json.decode(raw) != number:
            if reason == "sampling" and rules.any_sampling:
                continue
            return reason
    temperature = fields.get("temperature")
    if not rules.any_sampling and (temperature is None or msgspec.json.decode(temperature) != 0):
        return "sampling"
    return ""


def _unfit(endpoint: Endpoint, fields: Fields) -> str:
    """Return the reason why text cannot be appended to the prompt; "" when it can."""
    if endpoint.name == "chat":
        closed = bytes(fields.get("add_generation_prompt", b"true")) == b"false"
        return "prompt" if closed and bytes(fields.get("continue_final_message", b"false")) != b"true" else ""
    if endpoint.name == "completions" and not any(_number(fields, name) for name in ("max_tokens", "n_predict")):
        return "no_limit"
    prompt = bytes(fields.get(_prompt(endpoint, fields), b""))
    if not prompt:
        return "prompt"
    return "" if prompt[0] == 0x22 or _ids(prompt) is not None else "choices"


def _prompt(endpoint: Endpoint, fields: Fields) -> str:
    """Return the name of the field with the prompt."""
    if endpoint.name == "completions":
        return "prompt"
    return "input_ids" if bytes(fields.get("text", b"null")) in ABSENT else "text"


def _ids(prompt: bytes) -> list[int] | None:
    """Return a prompt's token ids; None when it is not a list of ids, or an empty one."""
    try:
        return msgspec.json.decode(prompt, type=list[int]) or None
    except _MALFORMED:
        return None


def _number(fields: Fields, name: str) -> int | None:
    """Return a limit; None when it is missing or negative."""
    number = msgspec.json.decode(fields[name], type=int | None) if name in fields else None
    return None if number is None or number < 0 else number


# -- after the break ---------------------------------------------------------------------------------------------------


def go_on(endpoint: Endpoint, body: Body, generation: Generation, without_progress: int = 0) -> Next:
    """Return what to do when the worker broke after `generation`.

    body              the client's own, for which `refusal` returned ""
    without_progress  legs in a row that broke at the same token
    """
    if generation.reason:
        return Next(generation.reason)
    if without_progress >= MOST_BREAKS:  # the request itself may be what ends them
        return Next("no_progress")
    try:
        return _next(endpoint, body, generation)
    except _MALFORMED:
        return Next("unreadable")


def _next(endpoint: Endpoint, body: Body, generation: Generation) -> Next:
    fields = fields_of(body)
    sampling = _sampling(endpoint, fields)
    limits = {name: number for name in _LIMITS[endpoint.name] if (number := _number(sampling, name)) is not None}
    if endpoint.name == "generate":
        limits.setdefault("max_new_tokens", GENERATE_LIMIT)
    text, _, tokens = generation.written()
    left = {name: max(0, number - tokens) for name, number in limits.items()}
    events: list[bytes] = []
    over = any(number <= generation.tokens and not name.startswith("min") for name, number in limits.items())
    if generation.finished or generation.done or over:
        events, untold = generation.ending(_wants_usage(fields))
        if not untold:
            return Next(events=tuple(events))
        left = dict.fromkeys(left, 1) or {"max_tokens": 1}
    elif any(_begun(text, stop) for stop in _stops(sampling)):
        return Next("stop_begun")
    if left:
        fields = _with_limits(endpoint, fields, sampling, left)
    refused = _append(endpoint, fields, generation)
    return Next(refused) if refused else Next(events=tuple(events), body=encode(fields))


def _with_limits(endpoint: Endpoint, fields: Fields, sampling: Fields, limits: dict[str, int]) -> Fields:
    """Return the body's fields with these token limits."""
    lowered = sampling | {name: msgspec.Raw(b"%d" % number) for name, number in limits.items()}
    return fields | {"sampling_params": msgspec.Raw(encode(lowered))} if endpoint.name == "generate" else lowered


def _append(endpoint: Endpoint, fields: Fields, generation: Generation) -> str:
    """Append what was written to the prompt; return the reason when that is not possible, else ""."""
    text, ids, tokens = generation.written()
    if endpoint.name == "chat":
        return _append_message(fields, text) if text else ""
    name = _prompt(endpoint, fields)
    prompt = bytes(fields[name])
    if prompt[0] == 0x22:
        fields[name] = msgspec.Raw(_joined(prompt, text))
        return ""
    if not tokens:
        return ""
    if not ids or len(ids) < tokens:
        return "no_token_ids"
    fields[name] = msgspec.Raw(encode([*(_ids(prompt) or ()), *ids[:tokens]]))
    return ""


def _append_message(fields: Fields, text: str) -> str:
    """Make the text the last message of the chat, or the end of a last message that the client has continued."""
    messages = msgspec.json.decode(fields["messages"], type=list[msgspec.Raw])
    if bytes(fields.get("continue_final_message", b"false")) == b"true":
        last = fields_of(messages[-1]) if messages else {}
        content = bytes(last.get("content", b""))
        if content[:1] != b'"':
            return "prompt"
        messages[-1] = msgspec.Raw(encode(last | {"content": msgspec.Raw(_joined(content, text))}))
    else:
        messages.append(msgspec.Raw(encode({"role": "assistant", "content": text})))
        fields["continue_final_message"] = msgspec.Raw(b"true")
        fields["add_generation_prompt"] = msgspec.Raw(b"false")
    fields["messages"] = msgspec.Raw(encode(messages))
    return ""


def _joined(string: bytes, text: str) -> bytes:
    """Return a JSON string with `text` appended; its own bytes stay as they are."""
    return string[:-1] + encode(text)[1:]


def _wants_usage(fields: Fields) -> bool:
    raw = fields.get("stream_options")
    options = None if raw is None else msgspec.json.decode(raw, type=_Options | None)
    return options is not None and bool(options.include_usage)


def _stops(sampling: Fields) -> tuple[str, ...]:
    stop = msgspec.json.decode(sampling["stop"], type=str | list[str] | None) if "stop" in sampling else None
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _begun(text: str, stop: str) -> bool:
    """Return whether the text ends with a beginning of the stop string, which another worker would not recognise."""
    return any(text.endswith(stop[:size]) for size in range(1, len(stop)))
