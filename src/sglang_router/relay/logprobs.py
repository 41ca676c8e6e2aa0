"""Give decode's answer the log probabilities of the prompt, which only prefill computes (`/generate` of SGLang).

    prefill's answer    "meta_info": {"input_token_logprobs": [a, b, c], ...}      learn
    decode's answer     "meta_info": {"input_token_logprobs": [], ...}             whole; of a stream: each event, feed
    the client's        "meta_info": {"input_token_logprobs": [a, b, c], ...}

Lists are inserted as they came. A quote inside a text is escaped, so the name that is searched for is always that of a
member. What cannot be read, or is longer than MOST bytes, is left out: then the client gets decode's answer as it is.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from sglang_router.relay.injected import UsageHider
from sglang_router.routing.facts import Facts
from sglang_router.wire.gathering import Body
from sglang_router.wire.logprob_form import ResultForm
from sglang_router.wire.sse import payloads

MOST: Final = 4 << 20
"""Bytes of an answer that are read; and of a request in which the question is searched."""

_ASKED: Final = re.compile(rb'"return_logprob"\s*:\s*(?:true|\[)')
_LIST: Final = re.compile(rb'"input_token_logprobs"\s*:\s*\[\s*')
_ENDS: Final = (b"\n\n", b"\r\n\r\n")
_DONE: Final = b"[DONE]"
_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_event: Final = msgspec.json.Decoder(ResultForm).decode
_answer: Final = msgspec.json.Decoder(ResultForm | list[ResultForm]).decode


def asked(facts: Facts | None, body: Body) -> bool:
    """Return whether a request asks for log probabilities that a prefill worker has."""
    return (
        facts is not None
        and facts.endpoint.name == "generate"
        and len(body) <= MOST
        and _ASKED.search(body) is not None
    )


class PromptLogprobs(UsageHider):
    """See the module. For a stream it takes the place of what hides events: it changes them.

    ready  nothing more is to be learnt
    """

    __slots__ = ("_learnt", "_lists", "_size", "_streaming", "ready")

    def __init__(self, streaming: bool) -> None:
        super().__init__()
        self.ready = False
        self._streaming = streaming
        self._learnt: list[bytes] = []  # of prefill's answer, not read yet
        self._size = 0
        self._lists: dict[int, bytes] = {}  # by prompt: what stands between the brackets

    def __repr__(self) -> str:
        return f"<PromptLogprobs of {len(self._lists)} prompts{'' if self.ready else ', not ready'}>"

    # -- prefill's answer ----------------------------------------------------------------------------------------------

    def learn(self, data: bytes, done: bool) -> None:
        """Take bytes of prefill's answer, without its transfer coding; `done`: they are the last."""
        if self.ready:
            return
        self._learnt.append(data)
        self._size += len(data)
        if self._size > MOST:
            self.give_up()
        elif done or (self._streaming and any(end in data for end in _ENDS)):
            self._read(b"".join(self._learnt), done)

    def give_up(self) -> None:
        """Learn nothing more: there is no answer to learn from, or a too long one."""
        self.ready = True
        self._learnt.clear()

    def _read(self, learnt: bytes, done: bool) -> None:
        results: list[ResultForm] = []
        try:
            if self._streaming:
                results = [_event(data) for _, data in payloads(learnt) if data and data != _DONE]
            else:
                answer = _answer(learnt)
                results = answer if isinstance(answer, list) else [answer]
        except _ERRORS:
            done = True
        if not done and all(result.index is not None for result in results):
            return  # events of several prompts: the others may follow
        for place, result in enumerate(results):
            key = place if not self._streaming else result.index or 0
            raw = b"" if result.meta_info is None else bytes(result.meta_info.input_token_logprobs)
            if raw.startswith(b"["):
                self._lists.setdefault(key, raw[1:-1].strip())
        self.give_up()

    # -- decode's answer -----------------------------------------------------------------------------------------------

    def whole(self, body: bytes) -> bytes:
        """Return a whole answer with the lists; unchanged when it has not one place for each."""
        places = list(_LIST.finditer(body))
        if not self._lists or sorted(self._lists) != list(range(len(places))):
            return body
        pieces: list[bytes] = []
        end = 0
        for number, place in enumerate(places):
            pieces += (body[end : place.end()], self._inserted(number, body[place.end() : place.end() + 1]))
            end = place.end()
        return b"".join((*pieces, body[end:]))

    def _inserted(self, number: int, following: bytes) -> bytes:
        """Return what is inserted behind a bracket. following: the next byte; if it closes the list, no comma."""
        entries = self._lists[number]
        return entries + b"," if entries and following != b"]" else entries

    def feed(self, events: bytes) -> bytes:
        """Return whole events, each with the list of its prompt."""
        if not self._lists or _LIST.search(events) is None:
            return events
        passed: list[bytes] = []
        end = 0
        for event, data in payloads(events):
            end += len(event)
            passed.append(self._with_list(event, data))
        return b"".join((*passed, events[end:]))

    def _with_list(self, event: bytes, data: bytes) -> bytes:
        place = _LIST.search(event)
        if place is None:
            return event
        try:
            number = _event(data).index or 0
        except _ERRORS:
            return event
        if number not in self._lists:
            return event
        at = place.end()
        return event[:at] + self._inserted(number, event[at : at + 1]) + event[at:]

    def last(self, rest: bytes) -> bytes:
        """Return what is left at the end of a stream, as it is."""
        return rest
