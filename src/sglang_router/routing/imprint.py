"""What routing has of a body that another process holds."""

from __future__ import annotations


class Imprint:
    """Stands for a body: its `size`, and its fingerprint (`routing.quarantine`), b"" while that is not known."""

    __slots__ = ("digest", "size")

    def __init__(self, size: int, digest: bytes = b"") -> None:
        self.size = size
        self.digest = digest

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"<Imprint of {self.size} bytes>"
