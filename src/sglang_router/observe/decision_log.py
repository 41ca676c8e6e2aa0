"""The log of decisions (`--decision-log`): a line for each ended request, without any of its text.

    {"key":"5f3a90c1","format":"sglang-router-decisions","version":1,"block":256}
    {"t":1764279852.25,"id":"chatcmpl-4f","model":"tiny","session":"","endpoint":"chat","bytes":600,
     "chain":["q1W7uOo0Zf4","sZ0cM1n7k9U"],"stream":false,"prompt_tokens":150,"cached_tokens":64,
     "completion_tokens":16,"worker":"http://10.0.0.7:30000","policy":"cache_aware","branch":"hit","matched":256,
     "attempts":1,"outcome":"served","status":200,"ttft":0.095,"duration":0.8124}         (one line; broken here to fit)

To read it: the first line says what the file is; a reader refuses another `format` or `version`, and ignores fields
that it does not know, here and below. Each further line that has `t` is a request; they are in the order in which the
requests ended. A line with `missing` stands for so many that could not be written.

    t           when the request was complete, seconds since 1970
    id          of the request; model: as it names it; endpoint: a name of `routing.endpoints.ENDPOINTS`
    session     a keyed hash of the whole of what the client calls its session; "" without one
    bytes       of the routing text; of the body of a request without any, and where no worker was asked
    chain       a keyed hash for each whole block of `block` bytes of the routing text. It covers all of the text from
                its beginning, and the model, adapter and salt: two requests share as many blocks as their chains have
                equal hashes at the beginning. Empty where no worker was asked
    stream      a stream was asked for
    prompt_tokens, cached_tokens, completion_tokens    as the engine reported them; null where it did not
    worker      that was asked last; null: none was. policy, branch: why. matched: bytes of text that were believed to
                be cached there
    attempts    0: no worker was asked; 1: no retry
    outcome     how the last attempt ended, a label of `routing.outcome`; "unrouted" without one
    status      that the client was sent; 0: nothing
    ttft        seconds from `t` to the first byte of the answer; null without one
    duration    seconds from `t` to the last byte

The hashes are BLAKE2b of 8 bytes in base64. Their key is random and stands beside the log in FILE.key, which only its
owner can read, so that the chains of all files that were written with it compare. Who has the key can test whether a
text that he knows was sent; who has only the log cannot. `key` of the first line differs where the key does.

Hashing takes about a microsecond for each block. It is done on the event loop, but at most `_BLOCKS` blocks in one turn
of it; what waits is bounded, and more is dropped and counted. A thread of its own would hold the interpreter's lock for
up to 5 ms at a time.
"""

from __future__ import annotations

import os
import secrets
from base64 import urlsafe_b64encode
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import msgspec

from sglang_router.errors import ConfigError
from sglang_router.observe.decision_line import BLOCK, DecisionLine, DecisionLogHead
from sglang_router.observe.line_parts import on_one_line
from sglang_router.observe.log_files import PathFile
from sglang_router.observe.writer import CLOSE_TIMEOUT, LineBuffer
from sglang_router.routing.decision_record import DecisionRecord

_BLOCKS = 512
"""Blocks that are hashed in one turn of the event loop."""
_MOST_WAITING = 1 << 26
"""Bytes of text that may wait to be hashed."""
_OVERHEAD = 1024
"""Bytes that a request which waits counts besides its text."""
_KEY = 32
_DIGEST = 8
_encode = msgspec.json.Encoder().encode


class NumberedFiles:
    """A file with a head, moved to FILE.1 when it is large, FILE.1 to FILE.2, and so on; the last one is removed.

    A file that somebody else moved away is begun anew. Each new file begins with `head`.

    Raises: ConfigError, when the first file cannot be opened.
    """

    def __init__(self, path: str, max_bytes: int, files: int, head: bytes) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._head = head
        self._file = PathFile(path)
        try:
            self.fd()
        except OSError as exc:
            raise ConfigError(f"--decision-log {path}: {exc.strerror or exc}") from None

    def fd(self) -> int:
        """Return the descriptor to write to now. Raises: OSError."""
        if 0 < self._max_bytes <= self._file.size:
            self._make_room()
            self._file.close()
        fd = self._file.fd()
        if not os.fstat(fd).st_size:
            os.write(fd, self._head)
        return fd

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _make_room(self) -> None:
        """Number the files anew, so that the name is free."""
        names = [self._path, *(f"{self._path}.{number}" for number in range(1, self._files))]
        for newer, older in zip(names[-2::-1], names[:0:-1], strict=True):
            if os.path.exists(newer):
                os.replace(newer, older)
        if self._files == 1:
            os.unlink(self._path)


def read_key(path: str) -> bytes:
    """Return the key beside a log; make it when there is none.

    Raises: ConfigError, when it cannot be read or written, or is no key, or when the log is no plain file.
    """
    name = f"{path}.key"
    for each in (path, name):
        if os.path.exists(each) and not os.path.isfile(each):  # to open a pipe waits for its reader
            raise ConfigError(f"--decision-log: {each} is not a plain file")
    try:
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            with open(name, encoding="ascii") as file:
                key = bytes.fromhex(file.read())
            if len(key) != _KEY:
                raise ValueError from None
            return key
        with open(fd, "w", encoding="ascii") as file:
            key = secrets.token_bytes(_KEY)
            file.write(f"{key.hex()}\n")
            return key
    except OSError as exc:
        raise ConfigError(f"--decision-log: {name}: {exc.strerror or exc}") from None
    except ValueError:
        raise ConfigError(f"--decision-log: {name} is not the key of a log of decisions: remove it") from None


class HashChain:
    """The chain of one text, hashed in steps."""

    __slots__ = ("_at", "_key", "_last", "_text", "hashes")

    def __init__(self, key: bytes, namespace: bytes, text: bytes) -> None:
        self._key = key
        self._text = text
        self._at = 0
        self._last = blake2b(namespace, digest_size=_DIGEST, key=key).digest()
        self.hashes: list[str] = []

    def step(self, blocks: int) -> int:
        """Hash up to so many blocks; return how many were hashed. Fewer than asked for: all are."""
        key, text, last, hashes = self._key, self._text, self._last, self.hashes
        whole = len(text) - BLOCK
        done = 0
        at = self._at
        while at <= whole and done < blocks:
            last = blake2b(last + text[at : at + BLOCK], digest_size=_DIGEST, key=key).digest()
            hashes.append(urlsafe_b64encode(last)[:-1].decode())
            at += BLOCK
            done += 1
        self._at, self._last = at, last
        return done


class DecisionLogWriter:
    """See the module.

    key    of the hashes
    later  the event loop's `call_later`
    """

    def __init__(
        self, path: str, max_bytes: int, files: int, key: bytes, later: Callable[[float, Callable[[], None]], Any]
    ) -> None:
        self._key = key
        self._later = later
        name = blake2b(b"name", digest_size=4, key=key).hexdigest()
        head = _encode(DecisionLogHead(name)) + b"\n"
        self._buffer = LineBuffer(NumberedFiles(path, max_bytes, files, head), _missing)
        self._queue: deque[tuple[DecisionRecord, str, int, HashChain]] = deque()
        self._waiting = 0  # bytes of the texts in the queue
        self._scheduled = False
        self._dropped = 0

    def __repr__(self) -> str:
        return f"<DecisionLogWriter {len(self._queue)} waiting, {self.lost} lost>"

    @property
    def lost(self) -> int:
        """Requests that are missing in the log."""
        return self._dropped + self._buffer.lost

    def take(self, record: DecisionRecord, session: str, namespace: bytes, text: bytes) -> None:
        """Log a request that has ended.

        session  what its client calls its session, however long that is; "" without one
        text     its routing text, b"" when it is not known
        """
        size = len(text) + _OVERHEAD
        if self._waiting + size > _MOST_WAITING:
            self._dropped += 1
            return
        self._waiting += size
        self._queue.append((record, self._hashed(session), len(text), HashChain(self._key, namespace, text)))
        if not self._scheduled:
            self._scheduled = True
            self._later(0.0, self._step)

    def _step(self) -> None:
        self._scheduled = False
        self._hash(_BLOCKS)
        if self._queue:
            self._scheduled = True
            self._later(0.0, self._step)

    def _hash(self, blocks: int) -> None:
        """Hash up to so many blocks, and write the lines of the requests that are done."""
        lines, queue = [], self._queue
        while queue and blocks > 0:
            record, session, size, chain = queue[0]
            done = chain.step(blocks)
            if done == blocks:  # there may be more of it
                break
            blocks -= done + 1  # a line takes about as long as a block
            queue.popleft()
            self._waiting -= size + _OVERHEAD
            lines.append(self._line(record, session, size, chain.hashes))
        if lines:
            self._buffer.put_all(lines)

    def _line(self, record: DecisionRecord, session: str, size: int, chain: list[str]) -> str:
        line = DecisionLine(
            record.at,
            record.id,
            record.model,
            session,
            record.endpoint,
            size or record.body_bytes,
            chain,
            record.stream,
            record.prompt_tokens,
            record.cached_tokens,
            record.completion_tokens,
            record.worker,
            record.policy,
            record.branch,
            record.matched,
            0 if record.worker is None else record.retries + 1,
            record.outcome,
            record.status,
            record.first_byte,
            record.duration,
        )
        return f"{on_one_line(_encode(line).decode())}\n"

    def _hashed(self, session: str) -> str:
        if not session:
            return ""
        digest = blake2b(session.encode("utf-8", "surrogatepass"), digest_size=_DIGEST, key=self._key).digest()
        return urlsafe_b64encode(digest)[:-1].decode()

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Write everything that was taken, and close the file; wait at most `timeout` seconds for a blocked disk."""
        while self._queue:
            self._hash(_BLOCKS)
        self._buffer.close(timeout)


def _missing(number: int) -> str:
    return f'{{"missing":{number}}}\n'
