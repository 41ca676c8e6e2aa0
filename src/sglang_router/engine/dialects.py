"""The shape of answers in each protocol: as a whole, and as a stream of server-sent events.

A dialect turns generations into JSON. For a stream, its methods are called in this order:

    opening() · delta(generation, new text)* · ending(generation), per generation · closing(generations)

Each returns bytes: complete events. `events.py` has the two dialects whose streams consist of named events.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from sglang_router.engine.parse import ParsedBody
from sglang_router.engine.runner import EngineGeneration

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"


def data(event: object) -> bytes:
    """Return one event without a name."""
    return b"data: " + encode(event) + b"\n\n"


class AnswerDialect(Protocol):
    """One protocol's answers to one request."""

    def __init__(self, parsed: ParsedBody) -> None: ...
    def whole(self, generations: Sequence[EngineGeneration]) -> object: ...
    def opening(self, generations: Sequence[EngineGeneration]) -> bytes: ...
    def delta(self, generation: EngineGeneration, text: str) -> bytes: ...
    def ending(self, generation: EngineGeneration) -> bytes: ...
    def closing(self, generations: Sequence[EngineGeneration]) -> bytes: ...


def usage(generations: Sequence[EngineGeneration], choices: int = 1) -> dict[str, Any]:
    """Return OpenAI's `usage`, in tokens. A prompt with several choices counts once."""
    prompts = generations[::choices]
    prompt = sum(generation.request.prompt for generation in prompts)
    written = sum(generation.shown for generation in generations)
    cached = sum(generation.request.cached for generation in prompts)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + written,
        "completion_tokens": written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class GenerateDialect:
    """SGLang's `/generate`: each event contains the whole text so far."""

    def __init__(self, parsed: ParsedBody) -> None:
        self._many = parsed.many

    def whole(self, generations: Sequence[EngineGeneration]) -> object:
        return [self._one(one) for one in generations] if self._many else self._one(generations[0])

    def opening(self, generations: Sequence[EngineGeneration]) -> bytes:
        return b""

    def delta(self, generation: EngineGeneration, text: str) -> bytes:
        # The last part of the text is sent by `ending`, together with the finish reason.
        return b"" if generation.finish else self._event(generation)

    def ending(self, generation: EngineGeneration) -> bytes:
        return self._event(generation)

    def closing(self, generations: Sequence[EngineGeneration]) -> bytes:
        return DONE

    def _event(self, generation: EngineGeneration) -> bytes:
        one = self._one(generation)
        if self._many:
            one["index"] = generation.index
        return data(one)

    @staticmethod
    def _one(generation: EngineGeneration) -> dict[str, Any]:
        request = generation.request
        return {
            "text": generation.text,
            "output_ids": generation.writer.tokens[: generation.shown],
            "meta_info": {
                "id": request.rid,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": request.prompt,
                "weight_version": "default",
                "num_retractions": request.retractions,
                "completion_tokens": generation.shown,
                "cached_tokens": request.cached,
                "e2e_latency": generation.latency,
            },
        }


class _OpenAI:
    """The common part of chat and text completions: ids, usage, chunks."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, parsed: ParsedBody) -> None:
        self._choices = parsed.choices
        self._include_usage = parsed.include_usage
        self._id = self.prefix + uuid.uuid4().hex
        self._created = int(time.time())
        self._model = parsed.model

    def opening(self, generations: Sequence[EngineGeneration]) -> bytes:
        return b""

    def delta(self, generation: EngineGeneration, text: str) -> bytes:
        return data(self._chunk([self._part(generation, text, None)]))

    def ending(self, generation: EngineGeneration) -> bytes:
        return data(self._chunk([self._part(generation, None, generation.finish)]))

    def closing(self, generations: Sequence[EngineGeneration]) -> bytes:
        if not self._include_usage:
            return DONE
        return data(self._chunk([]) | {"usage": usage(generations, self._choices)}) + DONE

    def whole(self, generations: Sequence[EngineGeneration]) -> object:
        return {
            "id": self._id,
            "object": self.kind,
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(generation) for generation in generations],
            "usage": usage(generations, self._choices),
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.chunk_kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _part(self, generation: EngineGeneration, text: str | None, finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, generation: EngineGeneration) -> dict[str, Any]:
        raise NotImplementedError


class ChatDialect(_OpenAI):
    """OpenAI's `/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def opening(self, generations: Sequence[EngineGeneration]) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(
            data(self._chunk([{"index": one.index, "delta": role, "logprobs": None, "finish_reason": None}]))
            for one in generations
        )

    def _part(self, generation: EngineGeneration, text: str | None, finish: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        part = {"index": generation.index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return part if finish is None else part | {"matched_stop": generation.writer.matched}

    def _choice(self, generation: EngineGeneration) -> dict[str, Any]:
        return {
            "index": generation.index,
            "message": {"role": "assistant", "content": generation.text, "tool_calls": None},
            "logprobs": None,
            "finish_reason": generation.finish,
            "matched_stop": generation.writer.matched,
        }


class CompletionDialect(_OpenAI):
    """OpenAI's `/v1/completions`."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl-"

    def _part(self, generation: EngineGeneration, text: str | None, finish: str | None) -> dict[str, Any]:
        return {"index": generation.index, "text": text or "", "logprobs": None, "finish_reason": finish}

    def _choice(self, generation: EngineGeneration) -> dict[str, Any]:
        return self._part(generation, generation.text, generation.finish) | {"matched_stop": generation.writer.matched}
