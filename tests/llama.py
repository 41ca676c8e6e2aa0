"""Real llama.cpp engines for tests, on a tiny model made on the spot.

with llama_processes(2) as urls:
    ...                          # two llama.cpp servers, each with its own slots and its own prefix cache
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tiny_gguf
from engines import engine_processes

SMALL = ("--threads", "1", "--parallel", "4", "--ctx-size", "32768")  # 8192 tokens in each slot


def llama_flags(model: Path, *flags: str) -> tuple[str, ...]:
    """The flags that start `model` under llama.cpp, small enough to run several beside each other."""
    return ("--backend", "llamacpp", "--model-path", str(model), *SMALL, *flags)


@contextlib.contextmanager
def llama_processes(n: int, *flags: str) -> Iterator[list[str]]:
    """`n` healthy llama.cpp servers on the tiny model; their URLs. `--cache-ram 0` makes the cache scarce."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_gguf.make(Path(folder) / "tiny.gguf")
        with engine_processes(n, *llama_flags(model, *flags)) as urls:
            yield urls
