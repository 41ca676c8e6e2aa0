"""Parts of the HTTP grammar (RFC 9110 5.6.2, 5.5), as sources of regular expressions."""

from __future__ import annotations

from typing import Final

TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
VALUE: Final = rb"[\t\x20-\x7e\x80-\xff]*"
