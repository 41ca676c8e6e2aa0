"""What the fakes make of a prompt: tokens are words, and an answer shows which prompt it is for."""

from __future__ import annotations

import json
import zlib
from typing import Any


def tokens_of(prompt: str) -> int:
    return max(1, len(prompt.split()))


def answer_token(prompt: str, number: int) -> str:
    """Return one token of the answer to a prompt; any two prompts have different answers."""
    return f" {zlib.crc32(prompt.encode()):08x}.{number}"


def answer_text(prompt: str, count: int) -> str:
    return "".join(answer_token(prompt, number) for number in range(count))


def chat_prompt(messages: list[dict[str, Any]]) -> str:
    """Return what the template makes of messages; contents may be parts."""
    said = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = " ".join(part.get("text", "") for part in content)
        said.append(f"<{message.get('role')}> {content}")
    return " ".join(said)


def prompts_of(path: str, body: dict[str, Any]) -> tuple[list[str], bool]:
    """Return the prompts of a request, and whether it is a batch.

    Token ids stand for words. Raises: KeyError if there is no prompt.
    """
    if path == "/v1/chat/completions":
        return [chat_prompt(body["messages"])], False
    given = body["prompt"] if path == "/v1/completions" else body["text"] if "text" in body else body["input_ids"]
    if isinstance(given, str):
        return [given], False
    if given and isinstance(given[0], int):
        return [_words(given)], False
    return [each if isinstance(each, str) else _words(each) for each in given], True


def _words(ids: list[int]) -> str:
    return " ".join(f"#{number}" for number in ids)


def wanted_tokens(path: str, body: dict[str, Any]) -> int:
    """Return how many tokens the answer must have."""
    if path == "/generate":
        return int((body.get("sampling_params") or {}).get("max_new_tokens", 8))
    return int(body.get("max_completion_tokens") or body.get("max_tokens") or 8)


def samples_of(path: str, body: dict[str, Any]) -> int:
    """Return `n`."""
    holder = (body.get("sampling_params") or {}) if path == "/generate" else body
    return int(holder.get("n") or 1)


class PrefixCache:
    """Counts the words at the beginning of a prompt that were seen before; the last word is always computed anew."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def cached(self, prompt: str) -> int:
        """Return the cached words of a prompt, and remember it."""
        words = prompt.split()
        best = max((_shared(words, other) for other in self._seen), default=0)
        self._seen.add(tuple(words))
        return min(best, max(0, len(words) - 1))

    def clear(self) -> None:
        self._seen.clear()


def _shared(words: list[str], other: tuple[str, ...]) -> int:
    count = 0
    for mine, theirs in zip(words, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def sse(value: Any) -> bytes:
    """Return one server-sent event; text goes as it is, all else as JSON."""
    data = value if isinstance(value, str) else json.dumps(value)
    return f"data: {data}\n\n".encode()
