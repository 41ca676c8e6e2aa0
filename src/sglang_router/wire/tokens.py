"""Parts of the HTTP grammar (RFC 9110 5.6.2, 5.5), as sources of regular expressions."""

from __future__ import annotations

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
