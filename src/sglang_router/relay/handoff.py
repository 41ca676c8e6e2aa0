"""What a prefill worker handed over for the decode worker of its pair (vLLM: `kv_transfer_params`).

    prefill's answer --> params_of --> Handed --> give(leg) --> the decode leg, with the parameters in its body
                                         ^           |
                                         '-----------'-- the worker could not be reached: take_back

The parameters name blocks that the prefill worker keeps for LEASE seconds, or until one decode worker has fetched them.
Older ones are accepted by engines although the blocks may hold another prompt by then, so they are dropped here. And a
decode worker that was reached may have fetched them: its next attempt goes without, and computes the prompt itself.
"""

from __future__ import annotations

from typing import Final

import msgspec

from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg
from sglang_router.routing.transfer import LEASE, UNREACHED
from sglang_router.routing.usage import Usage
from sglang_router.wire.handoff_form import HandoffForm, TransferForm

MOST: Final = 1 << 20
"""Bytes of a prefill worker's answer that are read."""

RESULTS: Final = ("given", "absent", "expired", "used")
"""What became of it: the last decode leg was given it; there was nothing; it was too old; another worker may have used
it up. After all but the first, decode computes the prompt itself."""

_decode: Final = msgspec.json.Decoder(HandoffForm).decode
_decode_params: Final = msgspec.json.Decoder(TransferForm).decode


def params_of(body: bytes) -> bytes:
    """Return the parameters in a prefill worker's answer, as they came; b"" for none."""
    try:
        raw = bytes(_decode(body).kv_transfer_params)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return b""
    return raw if raw.startswith(b"{") else b""


def is_pushed(params: bytes) -> bool:
    """Return whether the prefill worker does not wait for decode to fetch the blocks, but sends them (Nixl push)."""
    try:
        return _decode_params(params).transfer_mode == "push"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


class Handed:
    """See the module.

    cached  tokens of the prompt that the prefill worker had in its cache; -1: it does not tell
    result  one of RESULTS; "": no decode leg was sent yet
    """

    __slots__ = ("_at", "_lease", "_params", "cached", "result")

    def __init__(self, params: bytes, at: float, usage: Usage | None) -> None:
        """params: as they came; b"" for none. at: when they came, seconds of the router's clock."""
        self._params = params
        self._at = at
        self._lease = 0  # of the leg that was given them; 0: none
        self.result = ""
        self.cached = -1 if usage is None else usage.cached

    def __repr__(self) -> str:
        return f"<Handed {self.result or 'to give'}>"

    def give(self, leg: PlannedLeg, sent: float) -> None:
        """Add the parameters to the splice of a decode leg, if there are any that may be used.

        sent  when the leg is sent, seconds of the router's clock
        """
        if not self._params:
            self.result = "absent"
        elif self._lease:
            self.result = "used"
        elif sent > self._at + LEASE:
            self.result = "expired"
        else:
            self.result = "given"
            self._lease = leg.lease
            members = b'"kv_transfer_params":' + self._params
            leg.splice = leg.splice + b"," + members if leg.splice else members

    def take_back(self, leg: PlannedLeg, outcome: Outcome) -> None:
        """Let the next leg have the parameters: this one failed, and never reached its worker."""
        if self._lease == leg.lease and outcome in UNREACHED:
            self._lease = 0

    def correct(self, usage: Usage) -> None:
        """Tell what was cached as the prefill worker found it: for the decode worker nothing is."""
        if self.cached >= 0:
            usage.cached = self.cached
