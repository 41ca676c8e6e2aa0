"""What was told of the tokens of one worker's answers: plain figures, which policies and metrics read.

    told(usage, endpoint)        counts an answer
    rate.told(bytes, tokens)     bytes of routing text for one token of a prompt, learnt from what passes
    predict(...)                 how many tokens of a prompt a matched prefix should be

*Nothing instead of zero.* SGLang's OpenAI endpoints, and older versions of vLLM, leave the cached tokens out when there
are none. So an answer without them counts as 0 once the same endpoint of this worker has told some; before that, it is
not known whether the engine tells them at all.
"""

from __future__ import annotations

from typing import Final

from sglang_router.routing.usage import Usage

_USUAL: Final = 4.0
"""Bytes for one token, until something is known."""
_SHARE: Final = 1 / 32
"""How much the last prompt counts."""


class TextRate:
    """Bytes of routing text for one token of a prompt, of the recent prompts together.

    bytes_per_token  4 until something is known
    """

    __slots__ = ("_bytes", "_tokens", "bytes_per_token")

    def __init__(self) -> None:
        self._bytes = self._tokens = 0.0
        self.bytes_per_token = _USUAL

    def __repr__(self) -> str:
        return f"<TextRate {self.bytes_per_token:.2f} bytes a token>"

    def told(self, size: int, tokens: int) -> None:
        """Take a prompt of so many bytes and tokens."""
        if size > 0 and tokens > 0:
            share = _SHARE if self._tokens else 1.0
            self._bytes += (size - self._bytes) * share
            self._tokens += (tokens - self._tokens) * share
            self.bytes_per_token = self._bytes / self._tokens


class Tokens:
    """See the module. In tokens, since the worker was registered.

    prompt      of prompts
    cached      those of them that the engine had in its cache
    completion  of answers
    rate        how long a token is
    """

    __slots__ = ("_telling", "cached", "completion", "prompt", "rate")

    def __init__(self) -> None:
        self.prompt = self.cached = self.completion = 0
        self.rate = TextRate()
        self._telling: set[str] = set()  # endpoints that have told cached tokens

    def __repr__(self) -> str:
        return f"<Tokens {self.cached} of {self.prompt} cached, {self.completion} written>"

    def told(self, usage: Usage, endpoint: str) -> None:
        """Count the tokens of an answer; complete what the engine left out."""
        prompt, cached, completion = usage.prompt, usage.cached, usage.completion
        if cached > 0:
            self._telling.add(endpoint)
            self.cached += cached
        elif cached < 0 and prompt >= 0 and completion > 0 and endpoint in self._telling:
            usage.cached = 0
        if prompt > 0:
            self.prompt += prompt
        if completion > 0:
            self.completion += completion

    def tells(self, endpoint: str) -> bool:
        """Return whether an endpoint has told cached tokens, and so is known to tell them."""
        return endpoint in self._telling

    def predict(self, matched: int, total: int, prompt: int) -> int:
        """Return how many tokens of a prompt are believed to be cached.

        matched, total  bytes of its routing text
        prompt          tokens

        Its own tokens say how long they are, unless only the beginning of the text was kept; then the rate does.
        """
        by_rate = int(matched / self.rate.bytes_per_token)
        by_share = matched * prompt // total
        return by_share if by_share < by_rate else by_rate

    def emptied(self) -> None:
        """Take note that another process may answer now, which may tell less."""
        self._telling.clear()
