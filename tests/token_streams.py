"""An engine whose answer is a fixed list of tokens, for tests of streams that another worker continues.

    body = ask(Style("chat"), limit=5)             # a client's request
    answer(Style("chat"), body, leg=0)             # the data of each event that an engine streams for it
    seen(Style("chat"), events)                    # what a client understands of them

It reads a body as engines do, finds from the prompt how much of the list is already written, and streams the rest in a
`Style`. `leg` numbers the engines, each of which gives its answers an id of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_router.resume.generation import DONE
from sglang_router.routing.endpoints import ENDPOINTS, Endpoint

TOKENS = ("Hel", "lo", ' "wör', "ld\\", "\n", " and", " \U0001f600", " more", ".")
IDS = tuple(range(101, 101 + len(TOKENS) + 1))  # the last one ends the text, and has none
PROMPT, PROMPT_IDS = 'Say "hällo"', [1, 2, 3]
PATHS = {"generate": b"/generate", "chat": b"/v1/chat/completions", "completions": b"/v1/completions"}


class Style(NamedTuple):
    """How an engine streams.

    incremental  each event holds only the new text (/generate)
    continuous   each event holds a usage
    merged       the finish reason comes with the last token
    ids          the prompt is token ids
    joined       the finish reason comes with the usage
    bare         the stream contains no token ids
    """

    endpoint: str
    incremental: bool = False
    continuous: bool = False
    merged: bool = False
    ids: bool = False
    joined: bool = False
    bare: bool = False

    @property
    def row(self) -> Endpoint:
        return ENDPOINTS[PATHS[self.endpoint]]


STYLES = (
    Style("generate"),
    Style("generate", incremental=True),
    Style("generate", ids=True),
    Style("generate", ids=True, incremental=True),
    Style("generate", bare=True),
    Style("generate", bare=True, incremental=True),
    Style("chat"),
    Style("chat", merged=True),
    Style("chat", merged=True, continuous=True),
    Style("completions"),
    Style("completions", merged=True, continuous=True),
    Style("completions", joined=True),
    Style("completions", ids=True),
)


def ask(style: Style, limit: int | None = 50, usage: bool = True, **more: Any) -> bytes:
    """Return a client's request."""
    body: dict[str, Any] = {"model": "m", "stream": True, "x": [1.50, 1e3]}
    sampling: dict[str, Any] = {"temperature": 0} | ({} if limit is None else {"max_tokens": limit})
    prompt: Any = PROMPT_IDS if style.ids else PROMPT
    if style.endpoint == "generate":
        sampling["max_new_tokens"] = sampling.pop("max_tokens", 128)
        body |= {"input_ids" if style.ids else "text": prompt, "sampling_params": sampling}
    elif style.endpoint == "chat":
        body |= {"messages": [{"role": "user", "content": PROMPT}], **sampling}
    else:
        body |= {"prompt": prompt, **sampling}
    if usage and style.endpoint != "generate":
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body | more, ensure_ascii=False).encode()


def already(style: Style, body: dict[str, Any]) -> int:
    """Return how many tokens of the answer the prompt already holds."""
    if style.endpoint == "chat":
        go_on = body.get("continue_final_message", False)
        assert body.get("add_generation_prompt", True) is not go_on
        text = body["messages"][-1]["content"] if go_on else ""
    elif style.ids:
        ids = body["input_ids" if style.endpoint == "generate" else "prompt"]
        assert ids == [*PROMPT_IDS, *IDS[: len(ids) - len(PROMPT_IDS)]]
        return len(ids) - len(PROMPT_IDS)
    else:
        text = body["text" if style.endpoint == "generate" else "prompt"].removeprefix(PROMPT)
    counts = [n for n in range(len(TOKENS) + 1) if "".join(TOKENS[:n]) == text]
    assert counts, f"not at the end of a token: {text!r}"
    return counts[0]


def answer(style: Style, raw: bytes, leg: int) -> list[bytes]:
    """Return the events of an engine that is sent this body."""
    body = json.loads(raw)
    start = already(style, body)
    sampling = body["sampling_params"] if style.endpoint == "generate" else body
    limit = sampling.get("max_new_tokens", sampling.get("max_tokens", 99))
    assert limit > 0
    written = list(range(start, min(start + limit, len(IDS))))
    stopped = written[-1] == len(TOKENS)
    prompt = len(PROMPT_IDS) + start
    if style.endpoint == "generate":
        return [*snapshots(style, leg, prompt, written, stopped), DONE]
    return [*chunks(style, leg, prompt, written, stopped, "stream_options" in body), DONE]


def piece(token: int) -> str:
    return TOKENS[token] if token < len(TOKENS) else ""


def snapshots(style: Style, leg: int, prompt: int, written: list[int], stopped: bool) -> list[bytes]:
    events = []
    for n, last in enumerate(written, 1):
        shown = written[n - 1 : n] if style.incremental else written[:n]
        end = {"type": "stop", "matched": 2} if stopped else {"type": "length", "length": len(written)}
        meta = {
            "id": f"leg{leg}",
            "finish_reason": end if last == written[-1] else None,
            "prompt_tokens": prompt,
            "completion_tokens": n,
            "cached_tokens": leg,
        }
        text = "".join(map(piece, shown))
        ids = {} if style.bare else {"output_ids": [IDS[i] for i in shown]}
        events.append(json.dumps({"text": text, **ids, "meta_info": meta}).encode())
    return events


def chunks(style: Style, leg: int, prompt: int, written: list[int], stopped: bool, usage: bool) -> list[bytes]:
    def event(choices: list[dict[str, Any]], count: int | None) -> bytes:
        fields: dict[str, Any] = {"id": f"leg{leg}", "object": "chunk", "created": leg, "model": f"m{leg}"}
        fields["choices"] = choices
        if usage:
            told = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + (count or 0)}
            details = {"prompt_tokens_details": {"cached_tokens": leg, "audio_tokens": None}}
            fields["usage"] = None if count is None else told | details
        return json.dumps(fields).encode()

    def choice(token: int | None, reason: str | None, **delta: Any) -> list[dict[str, Any]]:
        text = "" if token is None else piece(token)
        one: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if style.endpoint == "chat":
            return [one | {"delta": delta or ({"content": text} if token is not None else {})}]
        if style.ids and token is not None:
            one["token_ids"] = [IDS[token]]
        return [one | {"text": text}]

    events = []
    reason = "stop" if stopped else "length"
    if style.endpoint == "chat":
        events.append(event(choice(None, None, role="assistant", content=""), 0 if style.continuous else None))
    for n, token in enumerate(written, 1):
        last = token == written[-1] and style.merged
        if piece(token) or last:
            events.append(event(choice(token, reason if last else None), n if style.continuous else None))
    if not style.merged:
        events.append(event(choice(None, reason), len(written) if style.joined else None))
    if usage and not style.joined:
        events.append(event([], len(written)))
    return events


class Seen(NamedTuple):
    """What a client understands of a stream."""

    ids: set[str]
    text: str
    tokens: list[int]
    reason: str
    usage: tuple[int, int, int] | None
    roles: int
    dones: int


def seen(style: Style, events: Sequence[bytes]) -> Seen:
    assert events[-1] == DONE
    told = [json.loads(event) for event in events[:-1]]
    dones = list(events).count(DONE)
    if style.endpoint == "generate":
        texts = [event["text"] for event in told]
        lists = [event.get("output_ids", []) for event in told]
        text = "".join(texts) if style.incremental else texts[-1]
        assert style.incremental or all(texts[-1].startswith(text) for text in texts)
        tokens = [token for one in lists for token in one] if style.incremental else lists[-1]
        meta = told[-1]["meta_info"]
        counts = [event["meta_info"]["completion_tokens"] for event in told]
        assert counts == sorted(counts)
        usage = (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"])
        if meta["finish_reason"]["type"] == "length":
            assert meta["finish_reason"]["length"] == meta["completion_tokens"]
        ids = {event["meta_info"]["id"] for event in told}
        return Seen(ids, text, tokens, meta["finish_reason"]["type"], usage, 0, dones)
    choices = [choice for event in told for choice in event["choices"]]
    usages = [event["usage"] for event in told if event.get("usage")]
    last = usages[-1] if usages else None
    return Seen(
        {f"{event['id']} {event['created']} {event['model']}" for event in told},
        "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices),
        [token for choice in choices for token in choice.get("token_ids", [])],
        "".join(choice["finish_reason"] or "" for choice in choices),
        None if last is None else (last["prompt_tokens"], last["completion_tokens"], last["total_tokens"]),
        sum("role" in choice.get("delta", {}) for choice in choices),
        dones,
    )
