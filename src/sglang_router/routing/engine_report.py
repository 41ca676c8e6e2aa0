"""What an engine says about itself: what it serves, how much it holds, how busy it is.

`workers.engine_survey` asks engines and `workers.engine_answers` reads what they answer; here is only the record.
"""

from __future__ import annotations

from typing import Any

import msgspec


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """None where the engine does not tell: a missing figure is not a zero.

    model            name of the model
    version          of the engine
    context_length   tokens of prompt and answer together
    capacity_tokens  tokens its KV cache can hold
    ranks            data-parallel ranks inside the engine
    runtime          "vllm" for an engine that tells its version as vLLM does
    role             "prefill" or "decode", one half of each request; "regular": both
    bootstrap_port   where a prefill engine tells decode engines how to fetch its KV cache
    window           requests that it runs at once; of an engine as a whole, the sum of its ranks
    running          requests it computes now
    queued           requests queued inside it
    used_tokens      tokens its KV cache holds for running requests
    load_tokens      tokens held and queued, the engine's own measure of its load
    prefilled_tokens tokens of prompts that it has computed, counted since its start
    prefill_busy_us  microseconds that it was busy with that, counted as well
    """

    model: str | None = None
    version: str | None = None
    context_length: int | None = None
    capacity_tokens: int | None = None
    ranks: int | None = None
    runtime: str | None = None
    role: str | None = None
    bootstrap_port: int | None = None
    window: int | None = None
    running: int | None = None
    queued: int | None = None
    used_tokens: int | None = None
    load_tokens: int | None = None
    prefilled_tokens: int | None = None
    prefill_busy_us: int | None = None

    @property
    def requests(self) -> int:
        """Requests that it has, computed or queued, as far as it tells."""
        return (self.running or 0) + (self.queued or 0)

    def known(self) -> dict[str, int | str]:
        """Return what the engine told, by name."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}

    def without_load(self) -> EngineReport:
        """Return the same without what changes from moment to moment."""
        return msgspec.structs.replace(
            self,
            running=None,
            queued=None,
            used_tokens=None,
            load_tokens=None,
            prefilled_tokens=None,
            prefill_busy_us=None,
        )

    def updated(self, fields: dict[str, Any]) -> EngineReport:
        """Return the same with some fields replaced."""
        return msgspec.structs.replace(self, **fields)


NOTHING = EngineReport()
"""The report of an engine that told nothing."""
