"""Starts an engine of a prefill/decode pair on a machine without an accelerator.

    PAIR_ENGINE=sglang.launch_server python pair_engine.py FLAGS

The engine's own interpreter runs this file; nothing of the engine is changed. SGLang's code for pairs takes pinned
memory, and events and streams of CUDA, for granted: here pinned memory is memory, and what an event waits for has
happened. vLLM's engine and its worker spin around `sched_yield` while blocks move, which starves a machine of two
cores: here they sleep for a moment.

Processes that the engine spawns run this file again, except for its end; those that it forks have everything.
"""

from __future__ import annotations

import importlib
import os
import runpy
import time
from collections.abc import Callable
from typing import Any

PINNED = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
"""Functions of torch that take `pin_memory`."""
NAP = 0.0002  # seconds


class Happened:
    """An event, or a stream, of a device that does everything at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Happened:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a method that does nothing: record, wait, synchronize, wait_event, wait_stream."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Happened()

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def unpinned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that ignores `pin_memory`."""

    def called(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return called


def without_accelerator() -> None:
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        return
    for name in PINNED:
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.cuda.Event = Happened
    torch.cuda.current_stream = Happened
    torch.cuda.synchronize = lambda *_, **__: None


MODULE = os.environ["PAIR_ENGINE"]
if MODULE.startswith("sglang"):
    without_accelerator()
else:
    os.sched_yield = lambda: time.sleep(NAP)

if __name__ == "__main__":
    runpy.run_module(MODULE, run_name="__main__")
