"""Stands in for SGLang's kernel library, of which no CPU build is published, so that SGLang can be imported.

SGLang imports CPU kernels by name when it runs on a CPU. With `--attention-backend torch_native` it calls none
of those found here. So a name that ends in `_cpu` is a function that raises when it is called after all; any
other name, and every submodule, is missing, as SGLang expects on a machine without the library. It finds no
operators under `torch.ops.sgl_kernel` either and takes its own code in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} is needed, but only a stand-in for the library is installed")

    return missing
