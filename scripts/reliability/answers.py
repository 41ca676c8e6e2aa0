"""Questions to built-in engines, and the only right answer to each, byte for byte.

The answer of a built-in engine depends on the prompt only (`sglang_router.engine.text`), so the client knows it in
advance, whichever engine writes it:

    Questions.next() -> Question(path, raw request, text, streamed)
    fault_of(question, body, whole) -> "" or what is wrong: bytes missing, duplicated, out of order, of another answer

A stream that ended early must contain a prefix of the right text, in whole events, and end with an error event.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import msgspec

from sglang_router.engine.kv import pack
from sglang_router.engine.text import AnswerWriter, Tokenizer, render_chat

PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
GROUPS = 16
_SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sha", "tov", "zen", "pü", "日本", "ex", "ul", "im", "ar")
DIFFERENT = "other text than the engine's"
_END = b"\n\n"
_DONE = b"data: [DONE]"


class Question(NamedTuple):
    """`text` is the answer, `head` and `body` the request; `head` has no Connection header yet."""

    path: str
    body: bytes
    text: str
    streamed: bool

    def raw(self, close: bool) -> bytes:
        head = f"POST {self.path} HTTP/1.1\r\nhost: chaos\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(self.body)}\r\n" + ("connection: close\r\n" if close else "")
        return head.encode() + b"\r\n" + self.body


class Questions:
    """Distinct random prompts: a prefix that many share, then about `size` bytes that are never sent again.

    size       bytes of a prompt after the shared prefix
    tokens     least and most tokens of an answer
    tokenizer  may be shared with other instances
    """

    def __init__(
        self,
        lot: random.Random,
        size: int = 200,
        tokens: tuple[int, int] = (4, 48),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._lot = lot
        self._size = size
        self._tokens = tokens
        self._tokenizer = tokenizer or Tokenizer()
        self._beginnings = [_words(random.Random(group), 400) for group in range(GROUPS)]

    def next(self) -> Question:
        lot = self._lot
        path = lot.choice(PATHS)
        streamed = lot.random() < 0.6
        prompt = f"{lot.choice(self._beginnings)} {lot.randbytes(self._size // 2).hex()}"
        limit = lot.randint(*self._tokens)
        if path == "/generate":
            body: dict[str, Any] = {"text": prompt, "sampling_params": {"max_new_tokens": limit, "temperature": 0}}
        elif path == "/v1/completions":
            body = {"model": "m", "prompt": prompt, "max_tokens": limit, "temperature": 0}
        else:
            messages = [{"role": "user", "content": prompt}]
            body = {"model": "m", "messages": messages, "max_tokens": limit, "temperature": 0}
            prompt = render_chat(messages)
        body["stream"] = streamed
        return Question(path, msgspec.json.encode(body), self._answer(prompt, limit), streamed)

    def _answer(self, prompt: str, limit: int) -> str:
        tokens = self._tokenizer.encode(prompt)
        writer = AnswerWriter(pack(tokens), tokens[-2:], limit)
        while writer.reason is None:
            writer.next()
        return writer.text


def _words(lot: random.Random, size: int) -> str:
    """Return text of at least `size` bytes."""
    words, length = [], 0
    while length < size:
        word = "".join(lot.choices(_SYLLABLES, k=lot.randint(1, 4)))
        words.append(word)
        length += len(word.encode()) + 1
    return " ".join(words)


def fault_of(question: Question, body: bytes, whole: bool) -> str:
    """Return what is wrong with an answer of status 200; "" if nothing. `whole`: its HTTP message is complete."""
    try:
        if question.streamed:
            return _fault_of_stream(question, body, whole)
        return _fault_of_whole(question, body) if whole else ""
    except (msgspec.DecodeError, KeyError, IndexError, TypeError) as error:
        return f"not the engine's words: {type(error).__name__} {error}"


def aborted(body: bytes) -> bool:
    """Whether the engine itself aborted the answer because it was told to end."""
    return b'"type":"abort"' in body or b'"finish_reason":"abort"' in body


def error_event(body: bytes) -> str:
    """Return the code of the error event at the end of a stream; "" if there is none."""
    last = body.rstrip(b"\n").rpartition(_END)[2]
    data = last.rpartition(b"data: ")[2]
    try:
        error = msgspec.json.decode(data)["error"]
        return str(error["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""


def _fault_of_whole(question: Question, body: bytes) -> str:
    answer = msgspec.json.decode(body)
    if question.path == "/generate":
        text = answer["text"]
    else:
        if len(answer["choices"]) != 1:
            return f"{len(answer['choices'])} choices"
        choice = answer["choices"][0]
        text = choice["text"] if question.path == "/v1/completions" else choice["message"]["content"]
    return "" if text == question.text else DIFFERENT


def _fault_of_stream(question: Question, body: bytes, whole: bool) -> str:
    *events, rest = body.split(_END)
    if whole and (rest or not events or events[-1] != _DONE):
        return "a stream that ended cleanly, but without [DONE]"
    if whole or (events and events[-1] == _DONE):
        events.pop()
        whole = True
    else:
        events = _before_the_break(events, error_event(body) != "")
    if any(not event.startswith(b"data: {") for event in events):
        return "an event that is none"
    parsed = [msgspec.json.decode(event[6:]) for event in events]
    text = _cumulative(parsed) if question.path == "/generate" else _deltas(question.path, parsed)
    if text is None:
        return "events out of order, doubled, or of two answers"
    right = text == question.text if whole else question.text.startswith(text)
    return "" if right else DIFFERENT


def _before_the_break(events: list[bytes], told: bool) -> list[bytes]:
    """Return a broken stream without its error event, the blank lines before it, and an incomplete event."""
    left = [event.strip(b"\n") for event in events[: len(events) - told]]
    left = [event for event in left if event]
    if told and left and not left[-1].endswith(b"}"):
        left.pop()
    return left


def _cumulative(events: list[Any]) -> str | None:
    """Return the text of SGLang's events, each of which contains the text so far. Only the last may have nothing
    new."""
    text = ""
    for number, event in enumerate(events):
        longer = event["text"]
        finished = event["meta_info"]["finish_reason"] is not None
        if not longer.startswith(text) or event["meta_info"]["id"] != events[0]["meta_info"]["id"]:
            return None
        if finished != (number == len(events) - 1) and finished:
            return None
        if len(longer) == len(text) and not finished:
            return None
        text = longer
    return text


def _deltas(path: str, events: list[Any]) -> str | None:
    """Return the text of OpenAI's events, each of which contains the next part."""
    text, finished = "", False
    for number, event in enumerate(events):
        (choice,) = event["choices"]
        if finished or event["id"] != events[0]["id"]:
            return None
        if path == "/v1/completions":
            text += choice["text"]
        else:
            if ("role" in choice["delta"]) != (number == 0):
                return None
            text += choice["delta"].get("content", "")
        finished = choice["finish_reason"] is not None
    return text
