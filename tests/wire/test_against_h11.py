"""Beside h11, another parser by other people: where the two disagree, the reason is known, listed here and judged.

Messages are the corpora, and good messages with a few bytes put in, taken out or doubled. For each, both parsers say `ok`,
`more` or `refused`, and what they understood. Three things must hold:

    both serve it                 they understood the same
    only one of them refuses it   the reason it gives is one of the tables below, with its judgement
    neither refuses it            both say `ok`, or both `more`

So a disagreement of a new kind fails, in a corpus or under Hypothesis; and a kind that no longer occurs fails as well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_corpus import corpus, read_requests, read_response

from sglang_router.wire.request import Limits

LIMITS = Limits(body_bytes=1 << 62)

STRICTER = {
    "Content-Length can't be present with Transfer-Encoding": "",
}
