"""Where relay processes cannot be, the start says so."""

from __future__ import annotations

import threading

import pytest

from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.processes.serve import serve


def test_a_thread_of_another_program_cannot_have_relay_processes() -> None:
    """A fork there would copy the locks of the other threads in whatever state they are."""
    found: list[str] = []

    def run() -> None:
        with pytest.raises(ConfigError, match="no other thread in it") as caught:
            serve(RouterArgs(relay_processes=2))
        found.append(str(caught.value))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 1
