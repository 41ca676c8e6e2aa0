"""Following KV events over real ZeroMQ sockets: replay, gaps, restarts, floods and nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec
import pytest
import uvloop

from kv_publisher import CLEARED, Publisher, removed, stored
from sglang_router.routing.kv_blocks import Holder
from sglang_router.routing.kv_index import KVIndex
from sglang_router.workers import kv_stream
from sglang_router.workers.kv_stream import KVStreams

WITHIN = 20.0
PROMPT = list(range(100, 132))
A, B, C, D = (PROMPT[at : at + 8] for at in (0, 8, 16, 24))


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test on the event loop of a router."""
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(work, WITHIN))
    finally:
        loop.close()


class Following:
    """A stream that is followed, and what is known by it."""

    def __init__(self, publisher: Publisher, index: KVIndex, holder: Holder) -> None:
        self.publisher = publisher
        self.index = index
        self.holder = holder
        self.emptied = 0

    @property
    def tokens(self) -> int:
        levels = self.index.match(PROMPT).levels
        return next((tokens for tokens, holders in levels if holders & self.holder.bit), 0)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Poll until a condition holds: no event tells of it."""
        deadline = time.monotonic() + WITHIN / 2
        while not holds():
            assert time.monotonic() < deadline, (self.holder, self.holder.events, self.publisher.asked)
            await asyncio.sleep(0.002)

    def hear(self) -> None:
        """Take note that the cache was cleared."""
        self.emptied += 1

    async def live(self) -> None:
        """Wait until the stream is followed, and what is published from now on arrives."""
        await self.until(lambda: self.holder.live and self.publisher.subscribed)


@contextlib.asynccontextmanager
async def following(publisher: Publisher) -> AsyncIterator[Following]:
    streams, index = KVStreams(), KVIndex()
    found = Following(publisher, index, index.join("w"))
    task = asyncio.ensure_future(streams.follow(publisher.published, index, found.holder, "http://w", found.hear))
    try:
        yield found
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        streams.close()
        await publisher.stop()


@pytest.mark.parametrize("kind", [{}, {"rows": True}, {"topic": "kv"}], ids=["maps", "arrays", "with a topic"])
def test_what_was_published_before_is_replayed_and_then_followed(kind: dict[str, Any]) -> None:
    async def main() -> None:
        publisher = Publisher(**kind)
        await publisher.start()
        await publisher.publish(stored([-31, 77], None, A, 4), stored([2**64 - 1, 3], 77, B, 4))
        async with following(publisher) as it:
            await it.live()
            assert (it.tokens, it.holder.whole, publisher.asked) == (16, True, [0])
            await publisher.publish(stored([b"\x01" * 32], 3, C[:4], 4))
            await it.until(lambda: it.tokens == 20)
            await publisher.publish(removed([b"\x01" * 32, 3, 999]))
            await it.until(lambda: it.tokens == 12)
            await publisher.publish(CLEARED)
            await it.until(lambda: it.tokens == 0)
            assert it.holder.whole
            await publisher.publish(stored([-31, 77], None, A, 4))
            await it.until(lambda: it.tokens == 8)
            assert (it.holder.gaps, it.holder.resyncs, it.holder.unread, it.holder.events) == (0, 0, 0, 6)

    run(main())


def test_an_engine_that_has_published_nothing_is_known_to_be_empty() -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        async with following(publisher) as it:
            await it.live()
            assert it.holder.whole
            await publisher.publish(stored([1, 2], None, A, 4))
            await it.until(lambda: it.tokens == 8)

    run(main())


def test_a_gap_is_filled_from_the_replay() -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        async with following(publisher) as it:
            await it.live()
            await publisher.publish(stored([1, 2], None, A, 4))
            await publisher.publish(stored([3, 4], 2, B, 4), lost=True)
            await publisher.publish(stored([5, 6], 4, C, 4), lost=True)
            await publisher.publish(stored([7, 8], 6, D, 4))
            await it.until(lambda: it.tokens == 32)
            assert (it.holder.gaps, it.holder.resyncs, it.holder.whole) == (1, 0, True)
            assert publisher.asked == [0, 1]
            assert it.holder.events == 4, "each is applied once"

    run(main())


def test_what_was_lost_last_is_asked_for_after_a_while_of_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        async with following(publisher) as it:
            await it.live()
            await publisher.publish(stored([1, 2], None, A, 4), lost=True)
            await it.until(lambda: it.tokens == 8)
            await publisher.publish(stored([3, 4], 2, B, 4))
            await it.until(lambda: it.tokens == 16)
            assert (it.holder.gaps, it.holder.resyncs) == (0, 0)

    monkeypatch.setattr(kv_stream, "_QUIET", 0.02)
    run(main())


def test_after_a_gap_that_cannot_be_filled_all_is_learnt_anew_and_the_rest_may_be_unknown() -> None:
    async def main() -> None:
        publisher = Publisher(buffer=2)
        await publisher.start()
        async with following(publisher) as it:
            await it.live()
            await publisher.publish(stored([1, 2], None, A, 4))
            await it.until(lambda: it.tokens == 8)
            await publisher.publish(removed([1, 2]), lost=True)
            await publisher.publish(stored([9], None, D[:4], 4), lost=True)
            await publisher.publish(stored([3, 4], None, A, 4))
            await it.until(lambda: it.holder.resyncs == 1 and it.holder.live)
            assert (it.tokens, it.holder.gaps, it.holder.whole) == (8, 1, False)
            assert sorted(it.holder.blocks) == [3, 4, 9]
            await publisher.publish(CLEARED)
            await it.until(lambda: it.holder.whole)

    run(main())


def test_without_a_replay_a_stream_begins_in_the_middle_and_a_gap_begins_it_again() -> None:
    async def main() -> None:
        publisher = Publisher(replays=False)
        await publisher.start()
        await publisher.publish(stored([1, 2], None, A, 4))
        async with following(publisher) as it:
            await it.live()
            assert not it.holder.whole
            await publisher.publish(stored([3, 4], 2, B, 4), stored([5], None, A[:4], 4))
            await it.until(lambda: it.tokens == 4)
            assert it.holder.orphans == 2
            await publisher.publish(stored([6], 5, A[4:], 4), lost=True)
            await publisher.publish(stored([7, 8], None, A, 4))
            await it.until(lambda: it.tokens == 8 and it.holder.live)
            assert (it.holder.gaps, it.holder.resyncs, it.holder.whole) == (1, 1, False)
            assert sorted(it.holder.blocks) == [7, 8]

    run(main())


def test_a_cut_stream_is_lost_and_the_next_process_is_learnt_from_its_beginning() -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        await publisher.publish(stored([1, 2], None, A, 4), stored([3, 4], 2, B, 4))
        async with following(publisher) as it:
            await it.live()
            assert it.tokens == 16
            await publisher.stop()
            await it.until(lambda: not it.holder.live)
            await publisher.start()
            await publisher.publish(stored([1], None, A[:4], 4))
            await it.live()
            assert (it.tokens, it.holder.whole, publisher.asked) == (4, True, [0, 0])

    run(main())


def test_numbers_that_begin_anew_on_the_same_connection_are_another_process() -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        async with following(publisher) as it:
            await it.live()
            for number in range(3):
                await publisher.publish(stored([number], None, [number] * 4, 4))
            await it.until(lambda: len(it.holder.blocks) == 3)
            publisher.seq = 0
            publisher._buffer.clear()
            await publisher.publish(stored([50, 51], None, A, 4))
            await it.until(lambda: it.holder.resyncs == 1 and it.holder.live)
            assert (sorted(it.holder.blocks), it.tokens, it.holder.whole) == ([50, 51], 8, True)

    run(main())


def test_nonsense_is_counted_and_what_follows_is_read() -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        async with following(publisher) as it:
            await it.live()
            await publisher.send_frames(b"", b"short", b"x")
            await publisher.send_frames(b"alone")
            await publisher.send(b"\xc1 is no msgpack")
            await publisher.send(msgspec.msgpack.encode({"ts": 1.0}))
            await publisher.publish({"type": "SomethingNew", "x": 1}, {"type": "BlockStored", "block_hashes": "no"})
            await publisher.publish(stored([1, 2], None, A, 4))
            await it.until(lambda: it.tokens == 8)
            assert (it.holder.unread, it.holder.gaps, it.holder.resyncs) == (5, 0, 0)
            assert not it.holder.whole, "it may hold what could not be read"

    run(main())


def test_in_a_flood_the_event_loop_goes_on_turning() -> None:
    """Each piece is short: between two turns of the loop lie at most some milliseconds of work."""

    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        tokens, blocks = list(range(60_000)), list(range(3750))
        for number in range(30):
            names = [number * 10_000 + block for block in blocks]
            await publisher.publish(stored(names, None, [number, *tokens[1:]], 16))
        turns = 0
        async with following(publisher) as it:
            while not it.holder.live:
                turns += 1
                await asyncio.sleep(0)
            assert it.holder.events == 30
            assert len(it.holder.blocks) == 30 * 3750
            assert turns > 30 * 3750 // 256

    run(main())


def test_a_message_that_is_too_long_cuts_the_stream_and_does_not_end_it() -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        async with following(publisher) as it:
            await it.live()
            await publisher.send_frames(b"", (0).to_bytes(8, "big"), bytes(3 << 20))
            await it.until(lambda: not it.holder.live)
            await it.live()
            await publisher.publish(stored([1, 2], None, A, 4))
            await it.until(lambda: it.tokens == 8)

    run(main())


def test_a_replay_that_does_not_answer_is_told_and_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        publisher.hangs = True
        async with following(publisher) as it:
            await it.live()
            await it.until(lambda: any("does not replay" in each.message for each in caplog.records))
            await publisher.publish(stored([1, 2], None, A, 4))
            await it.until(lambda: it.tokens == 8)
            await publisher.publish(stored([3], 2, B[:4], 4), lost=True)
            await publisher.publish(stored([9], None, A[:4], 4))
            await it.until(lambda: it.holder.resyncs == 1 and it.tokens == 4)
            assert publisher.asked == [0]

    monkeypatch.setattr(kv_stream, "_REPLAY_WITHIN", 0.2)
    run(main())


def test_an_engine_that_cannot_be_reached_is_told_once_and_followed_when_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        await publisher.stop()
        async with following(publisher) as it:
            for _ in range(3):
                await asyncio.wait_for(tries.get(), WITHIN / 2)
            assert not it.holder.live
            assert [each.message for each in caplog.records if "cannot be reached" in each.message] == [
                "the stream of KV events cannot be reached: the cache is estimated"
            ]
            await publisher.start()
            await it.live()

    tries: asyncio.Queue[int] = asyncio.Queue()
    socket = kv_stream.KVStream._socket

    def counted(self: kv_stream.KVStream, kind: int, most: int) -> Any:
        tries.put_nowait(kind)
        return socket(self, kind, most)

    monkeypatch.setattr(kv_stream.KVStream, "_socket", counted)
    monkeypatch.setattr(kv_stream, "_CONNECT_WITHIN", 0.2)
    monkeypatch.setattr(kv_stream, "_RECONNECT", 0.01)
    run(main())


def test_clearing_again_and_again_lets_the_event_loop_turn() -> None:
    async def main() -> None:
        publisher = Publisher()
        await publisher.start()
        await publisher.publish(*[CLEARED] * 500)
        turns = 0
        async with following(publisher) as it:
            while not it.holder.live:
                turns += 1
                await asyncio.sleep(0)
            assert it.holder.events == 500
            assert turns >= 500

    run(main())
