"""Text and tokens for the built-in engine: a tokenizer, a chat template, and a writer of answers without a model.

*Tokens.* A text is split into pieces of up to eight letters together with the space before them, similar to byte-pair
tokenizers. The id of a piece is its CRC-32. When text is added at the end, the ids of the old part stay the same, up to
the last piece: prefixes stay prefixes, which is all that a prefix cache needs from a tokenizer.

*Writing.* Output token i depends only on all tokens before it and on the seed:

    state(i) = CRC-32 of (seed, prompt, output[:i])  ── scrambled ──>  a word, a comma, a full stop, or the end

So every engine gives the same answer to the same prompt, and an engine that gets a prompt with the first half of an
answer writes the second half. Written text splits into the same tokens again, so the next turn of a conversation finds
the last answer in the cache. The text resembles English and ends after about 75 tokens.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

from sglang_router.engine.kv import pack

_PIECE = re.compile(r"<\|\w{1,30}\|>| ?\w{1,8}| ?(?:[^\w\s<]|<(?!\|)){1,4}|<|\s+(?!\S)|\s")
_VOCABULARY = (
    "the of and to in is that for it as with on by this from at not are an be or which but its their all "
    "one more can has was when each same other some two first last long short new old small large next "
    "only then where how both worker prefix cache token request answer model batch queue engine router "
    "memory page tree leaf root node path time load share turn part line step half word text name place "
    "order number reason result example moment takes keeps finds gives holds makes needs reads sends "
    "shows starts stops waits works moves leaves returns quickly slowly often never always again still "
    "almost enough early late near far above below before after"
)
_WORDS = tuple(_VOCABULARY.split())

END_OF_TURN = "<|im_end|>"


def token_id(piece: str) -> int:
    """Return the id of one piece: its CRC-32."""
    return zlib.crc32(piece.encode("utf-8", "surrogatepass"))


class _Ids(dict[str, int]):
    """The ids of the pieces seen so far."""

    def __missing__(self, piece: str) -> int:
        token = self[piece] = token_id(piece)
        return token


class Tokenizer:
    """Converts text to token ids and back. It can convert back only pieces it has seen; it keeps about `memory`."""

    def __init__(self, memory: int = 200_000) -> None:
        self._memory = memory
        self._ids = _Ids()
        self._pieces: dict[int, str] = {}
        self._add_own_words()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, 32 bits each."""
        if len(self._ids) > self._memory:
            self._ids.clear()
            self._add_own_words()
        ids = self._ids
        return [ids[piece] for piece in _PIECE.findall(text)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`; for a token never seen, a word of the writer's vocabulary."""
        if len(self._pieces) != len(self._ids):
            self._pieces = {token: piece for piece, token in self._ids.items()}
        return "".join(self._pieces.get(token) or " " + _WORDS[token % len(_WORDS)] for token in tokens)

    def _add_own_words(self) -> None:
        own = (".", ",", *(piece for words in (_PLAIN, _OPENING, _BARE) for _, piece in words))
        self._ids.update((piece, token_id(piece)) for piece in own)
        self._pieces = {}


def render_chat(messages: Sequence[object], tools: object = None, *, generate: bool = True, go_on: bool = False) -> str:
    """Return a conversation as one text, similar to ChatML: tools first, then one turn per message.

    `generate` opens the assistant's turn; `go_on` leaves the last message open instead, so that the answer continues
    it.
    """
    turns = [] if not tools else [f"<|im_start|>tools\n{_plain(tools)}{END_OF_TURN}\n"]
    for message in messages:
        fields = message if isinstance(message, dict) else {"content": message}
        calls = fields.get("tool_calls")
        said = content_text(fields.get("content")) + (_plain(calls) if calls else "")
        turns.append(f"<|im_start|>{fields.get('role', 'user')}\n{said}{END_OF_TURN}\n")
    text = "".join(turns)
    if go_on and messages:
        return text.removesuffix(END_OF_TURN + "\n")
    return text + "<|im_start|>assistant\n" if generate else text


def content_text(content: object) -> str:
    """Return the content of a message: text unchanged, an image or sound as a placeholder with its digest."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    return "" if content is None else _plain(content)


def _part_text(part: object) -> str:
    if not isinstance(part, dict):
        return content_text(part)
    if isinstance(part.get("text"), str):
        return str(part["text"])
    digest = zlib.crc32(_plain(part).encode("utf-8", "surrogatepass"))
    return f"<|media|>{part.get('type', 'part')} {digest:08x}<|media_end|>"


def _plain(value: object) -> str:
    """Nested data as text, in the order it came."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(value)


# -- writing -----------------------------------------------------------------------------------------------

_FULL_STOP, _COMMA, _NEWLINE, _END = (token_id(piece) for piece in (".", ",", "\n", END_OF_TURN))
_PLAIN = tuple((token_id(" " + word), " " + word) for word in _WORDS)
_OPENING = tuple((token_id(" " + word.capitalize()), " " + word.capitalize()) for word in _WORDS)
_BARE = tuple((token_id(word.capitalize()), word.capitalize()) for word in _WORDS)
_WRITTEN = frozenset(token for words in (_PLAIN, _OPENING, _BARE) for token, _ in words)


class AnswerWriter:
    """Writes one answer, token by token: `next` returns a token and, with the last token, the finish reason.

    `text` is the answer so far. `settled` is the number of its characters that can be sent: the rest may be the
    beginning of a stop string. `reason` is None, "stop" or "length"; `matched` is the stop string or stop token.
    """

    __slots__ = (
        "_before",
        "_last",
        "_state",
        "_stop_tokens",
        "_stops",
        "ignore_eos",
        "limit",
        "matched",
        "reason",
        "settled",
        "text",
        "tokens",
    )

    def __init__(
        self,
        prompt: bytes,
        tail: Sequence[int],
        limit: int,
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_tokens: Iterable[int] = (),
        ignore_eos: bool = False,
    ) -> None:
        """`prompt` is packed; `tail` holds its last two tokens, or fewer; `limit` is the most tokens to write."""
        self._state = zlib.crc32(prompt, seed)
        self._before, self._last = (0, 0, *tail)[-2:]
        self._stops = tuple(string for string in stop if string)
        self._stop_tokens = frozenset(stop_tokens)
        self.ignore_eos = ignore_eos
        self.limit = limit
        self.text = ""
        self.settled = 0
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.matched: str | int | None = None

    def next(self) -> tuple[int, str | None]:
        """Return the next token, and "stop" or "length" if it is the last."""
        token, piece = self._choose()
        self._state = zlib.crc32(pack((token,)), self._state)
        self._before, self._last = self._last, token
        self.tokens.append(token)
        self.text += piece
        self.settled = len(self.text)
        if token == _END or token in self._stop_tokens:
            self._end("stop", token)
        if self._stops:
            self._look_for_stop(piece)
        if self.reason is None and len(self.tokens) >= self.limit:
            self._end("length", None)
        return token, self.reason

    def _choose(self) -> tuple[int, str]:
        # CRC-32 is linear: scramble its bits (a multiplicative finaliser) before using them as random numbers.
        dice = (self._state ^ self._state >> 16) * 0x45D9F3B & 0xFFFFFFFF
        dice = (dice ^ dice >> 16) * 0x45D9F3B & 0xFFFFFFFF
        word, dice = dice % len(_WORDS), dice >> 16
        if self._last == _FULL_STOP:
            if self._before in _WRITTEN and dice % 6 == 0 and not self.ignore_eos:
                return _END, ""
            return _OPENING[word]
        if self._last == _NEWLINE:
            return _BARE[word]
        if self._last in _WRITTEN and dice % 8 == 0:
            return (_COMMA, ",") if dice % 24 == 0 else (_FULL_STOP, ".")
        return _PLAIN[word]

    def _look_for_stop(self, piece: str) -> None:
        text = self.text
        for stop in self._stops:
            found = text.find(stop, max(0, len(text) - len(piece) - len(stop) + 1))
            if found >= 0:
                self.text = text = text[:found]
                self.settled = found
                self._end("stop", stop)
                return
        if self.reason is None:
            self.settled = len(text) - max(_overlap(text, stop) for stop in self._stops)

    def _end(self, reason: str, matched: str | int | None) -> None:
        self.reason = reason
        self.matched = matched
        self.settled = len(self.text)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are a prefix of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
