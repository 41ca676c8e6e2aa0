"""The two dialects whose streams consist of named events: OpenAI's responses and Anthropic's messages.

response.created · .in_progress · .output_item.added · .content_part.added · .output_text.delta* ·
.output_text.done · .content_part.done · .output_item.done · response.completed

message_start · content_block_start · ping · content_block_delta* · content_block_stop ·
message_delta · message_stop
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from sglang_router.engine.dialects import encode
from sglang_router.engine.parse import ParsedBody
from sglang_router.engine.runner import EngineGeneration


def named(kind: str, fields: dict[str, Any]) -> bytes:
    """Return one event with a name, which is also the field `type` of its data."""
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"


class ResponsesDialect:
    """OpenAI's `/v1/responses`: one message with one text part."""

    def __init__(self, parsed: ParsedBody) -> None:
        self._body = parsed.body
        self._model = parsed.model
        self._id = "resp_" + uuid.uuid4().hex
        self._item = "msg_" + uuid.uuid4().hex
        self._created = int(time.time())
        self._number = -1

    def whole(self, generations: Sequence[EngineGeneration]) -> object:
        return self._response(generations[0])

    def opening(self, generations: Sequence[EngineGeneration]) -> bytes:
        response = self._response(None)
        part = {"content_index": 0, "part": self._part("")}
        return (
            self._event("response.created", {"response": response})
            + self._event("response.in_progress", {"response": response})
            + self._event("response.output_item.added", {"output_index": 0, "item": self._message(None)})
            + self._event("response.content_part.added", self._where() | part)
        )

    def delta(self, generation: EngineGeneration, text: str) -> bytes:
        more = {"content_index": 0, "delta": text, "logprobs": []}
        return self._event("response.output_text.delta", self._where() | more)

    def ending(self, generation: EngineGeneration) -> bytes:
        text = {"content_index": 0, "text": generation.text, "logprobs": []}
        part = {"content_index": 0, "part": self._part(generation.text)}
        item = {"output_index": 0, "item": self._message(generation)}
        response = self._response(generation)
        return (
            self._event("response.output_text.done", self._where() | text)
            + self._event("response.content_part.done", self._where() | part)
            + self._event("response.output_item.done", item)
            + self._event("response." + str(response["status"]), {"response": response})
        )

    def closing(self, generations: Sequence[EngineGeneration]) -> bytes:
        return b""

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        self._number += 1
        return named(kind, {"sequence_number": self._number, **fields})

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0}

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _message(self, generation: EngineGeneration | None) -> dict[str, Any]:
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": "in_progress" if generation is None else _status(generation),
            "content": [] if generation is None else [self._part(generation.text)],
        }

    def _response(self, generation: EngineGeneration | None) -> dict[str, Any]:
        status = "in_progress" if generation is None else _status(generation)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self._body.get("instructions"),
            "max_output_tokens": self._body.get("max_output_tokens"),
            "model": self._model,
            "output": [] if generation is None else [self._message(generation)],
            "parallel_tool_calls": True,
            "previous_response_id": self._body.get("previous_response_id"),
            "store": False,
            "temperature": self._body.get("temperature"),
            "text": {"format": {"type": "text"}},
            "tool_choice": self._body.get("tool_choice") or "auto",
            "tools": self._body.get("tools") or [],
            "top_p": self._body.get("top_p"),
            "truncation": "disabled",
            "usage": None if generation is None else _responses_usage(generation),
            "metadata": self._body.get("metadata") or {},
        }


def _status(generation: EngineGeneration) -> str:
    """Return how a response ended, in the protocol's words."""
    return {"stop": "completed", "length": "incomplete"}.get(generation.finish or "", "failed")


def _responses_usage(generation: EngineGeneration) -> dict[str, Any]:
    request = generation.request
    return {
        "input_tokens": request.prompt,
        "input_tokens_details": {"cached_tokens": request.cached},
        "output_tokens": generation.shown,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": request.prompt + generation.shown,
    }


class MessagesDialect:
    """Anthropic's `/v1/messages`: one block of text. Cached tokens are counted apart from the input tokens."""

    def __init__(self, parsed: ParsedBody) -> None:
        self._model = parsed.model
        self._id = "msg_" + uuid.uuid4().hex

    def whole(self, generations: Sequence[EngineGeneration]) -> object:
        generation = generations[0]
        reason = self._reason(generation)
        text = [{"type": "text", "text": generation.text}]
        return self._message(text) | reason | {"usage": self._usage(generation)}

    def opening(self, generations: Sequence[EngineGeneration]) -> bytes:
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        block = {"index": 0, "content_block": {"type": "text", "text": ""}}
        return (
            named("message_start", {"message": message | {"usage": self._usage(generations[0])}})
            + named("content_block_start", block)
            + named("ping", {})
        )

    def delta(self, generation: EngineGeneration, text: str) -> bytes:
        return named("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}})

    def ending(self, generation: EngineGeneration) -> bytes:
        delta = {"delta": self._reason(generation), "usage": self._usage(generation)}
        return named("content_block_stop", {"index": 0}) + named("message_delta", delta)

    def closing(self, generations: Sequence[EngineGeneration]) -> bytes:
        return named("message_stop", {})

    def _message(self, content: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
        }

    @staticmethod
    def _reason(generation: EngineGeneration) -> dict[str, Any]:
        matched = generation.writer.matched if generation.finish == "stop" else None
        if isinstance(matched, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": matched}
        reason = "max_tokens" if generation.finish == "length" else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}

    @staticmethod
    def _usage(generation: EngineGeneration) -> dict[str, int]:
        request = generation.request
        return {
            "input_tokens": request.prompt - request.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": request.cached,
            "output_tokens": generation.shown,
        }
