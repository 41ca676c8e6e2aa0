"""What a worker does of a request: all of it, or one half of it (prefill/decode disaggregation)."""

from __future__ import annotations

from typing import Final

REGULAR: Final = "regular"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
ROLES: Final = (REGULAR, PREFILL, DECODE)
