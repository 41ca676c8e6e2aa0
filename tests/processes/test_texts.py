"""The ring never gives out overlapping places, whatever is put and freed, and is used up to its end."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from sglang_router.processes.texts import TextRing, shared_memory


@given(steps=st.lists(st.one_of(st.integers(1, 40), st.just(0)), max_size=60), size=st.integers(8, 64))
def test_texts_stay_as_they_were_put_until_they_are_freed(steps: list[int], size: int) -> None:
    """A step is the length of a text to put; 0 frees the oldest."""
    memory = bytearray(size)
    ring = TextRing(memory)
    held: deque[tuple[int, bytes]] = deque()
    for number, step in enumerate(steps):
        if step:
            text = bytes([number % 256]) * step
            at = ring.put(text)
            if at >= 0:
                assert at + step <= size
                held.append((at, text))
            else:
                assert held or step > size, "an empty ring takes whatever fits"
        elif held:
            held.popleft()
            ring.free()
        for at, text in held:
            assert memory[at : at + len(text)] == text


def test_it_wraps_and_is_cleared() -> None:
    ring = TextRing(bytearray(10))
    assert [ring.put(b"four"), ring.put(b"four"), ring.put(b"four")] == [0, 4, -1]
    ring.free()
    assert [ring.put(b"four"), ring.put(b"x")] == [0, -1], "full: the newest text ends where the oldest begins"
    ring.free()
    assert ring.put(b"six666") == 4
    ring.clear()
    assert ring.put(b"ten1234567") == 0
    assert repr(ring) == "<TextRing 1 texts>"


def test_the_memory_of_a_relay_takes_the_longest_text() -> None:
    memory = shared_memory()
    ring = TextRing(memory)
    text = b"0123456789abcdef" * 65536
    assert (at := ring.put(text)) == 0
    assert memory[at : at + len(text)] == text
    memory.close()
