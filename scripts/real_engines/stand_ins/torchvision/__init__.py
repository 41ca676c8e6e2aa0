"""Stands in for torchvision, which SGLang imports for image models; PyPI's builds do not fit a CPU build of torch.

Text models call nothing of it. The modules that are imported on the way exist here; whatever name is taken from
them is a class that cannot be made. InterpolationMode is real, because its members are default arguments.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType

__version__ = "0.0"  # transformers asks
MODULES = ("io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional")


class InterpolationMode(enum.Enum):
    """How images would be resized."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Missing:
    """Something of torchvision that a text model never needs."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("torchvision is needed, but only a stand-in for it is installed")


def _any_name(name: str) -> type[Missing]:
    if name.startswith("__"):  # asked by the import system
        raise AttributeError(name)
    return Missing


def _add(name: str) -> None:
    module = ModuleType(f"{__name__}.{name}")
    module.__path__ = []
    vars(module).update(InterpolationMode=InterpolationMode, __getattr__=_any_name)
    sys.modules[module.__name__] = module
    parent, _, leaf = module.__name__.rpartition(".")
    setattr(sys.modules[parent], leaf, module)


for _module in MODULES:
    _add(_module)
