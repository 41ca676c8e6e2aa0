"""Read the small files that options name: configuration, keys, certificates.

Such a file is read on the event loop too, when it has changed or at SIGHUP. So nothing here may block or grow: a pipe
without a writer, a terminal and /dev/zero are refused, and a file has a largest size.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sglang_router.errors import ConfigError

LARGEST = 1 << 20
"""Bytes."""


def read(path: str | Path, largest: int = LARGEST, *, pipe: bool = False) -> bytes:
    """Return the content of a plain file. `pipe`: of a pipe as well, to its end; `--api-key-file <(command)` is one.

    Raises: ConfigError
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            kind = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(kind) and not (pipe and stat.S_ISFIFO(kind)):
                raise ConfigError(f"{path} is not a plain file")
            os.set_blocking(file.fileno(), True)
            content = file.read(largest + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > largest:
        raise ConfigError(f"{path} is larger than {largest >> 20} MiB")
    return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else opening a pipe waits for its writer


def is_pipe(path: str) -> bool:
    """Whether this is a pipe, which can be read only once."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False
