"""The key of a fleet: 32 bytes with which its routers name and seal what they tell each other.

A file has it as 64 hexadecimal digits (`openssl rand -hex 32`). Without a file the first router makes one and keeps it
in the store, so that who can read the store has it, too.
"""

from __future__ import annotations

from sglang_router.config import small_files
from sglang_router.errors import ConfigError

SIZE = 32


class FleetKey:
    """A key. own: what this router has; fixed: a file says it, so that the store is not asked."""

    def __init__(self, own: bytes, *, fixed: bool) -> None:
        self.own = own
        self.fixed = fixed

    def __repr__(self) -> str:
        return f"<FleetKey {'of a file' if self.fixed else 'of the store'}>"


def read(path: str) -> FleetKey:
    """Return the key in a file. Raises: ConfigError, which does not show what the file holds."""
    digits = small_files.read(path, pipe=True).strip()
    try:
        key = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != SIZE:
        raise ConfigError(f"{path} must hold {2 * SIZE} hexadecimal digits; make them: openssl rand -hex {SIZE}")
    return FleetKey(key, fixed=True)
