"""Units that people write behind a number: 64MiB, 10m, 30s.

    bytes          k, m, g, t     powers of 1024, as nginx and vLLM read them; MB, MiB and M are the same
    s, ms, days    ms, s, m, h, d

A number without a unit is in the option's own unit.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\s*([+-]?\d[\d_]*(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*")
_SIZE = re.compile(r"([kmgt]?)(?:i?b)?")
_POWERS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SECONDS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "secs": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
EXAMPLES = {"bytes": "64MiB", "s": "30s", "ms": "200ms", "days": "7d"}


def plain_number(text: str, unit: str) -> str:
    """Return a number with a unit as a number in `unit`; any other text unchanged, for the reader to judge."""
    match = _NUMBER.fullmatch(text)
    if match is None or unit not in EXAMPLES:
        return text
    suffix = match[2].lower()
    if unit == "bytes":
        size = _SIZE.fullmatch(suffix)
        factor: float | None = None if size is None else _POWERS[size[1]]
    else:
        factor = _SECONDS.get(suffix)
        if factor is not None:
            factor /= _SECONDS[{"ms": "ms", "days": "d"}.get(unit, "s")]
    if factor is None:
        return text
    number = float(match[1]) * factor
    return str(int(number)) if number.is_integer() else repr(number)
