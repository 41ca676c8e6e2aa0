"""A gateway that asks an endpoint picker over gRPC, as Envoy does: one stream for each HTTP request.

with picker(router) as gateway:                        serves gateways beside a `stack`
    asked = gateway.ask("/v1/completions", b'{"prompt":"x"}')
    asked.choice().endpoint                            what the picker answers to the headers
    asked.answer(200, b"...")                          the worker's answer, whose pieces the picker gives back
    asked.close()

with scene() as here:                                  the same, with fake workers and what is told of each end
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc

from routers import free_port
from sglang_router.picker.front import PickerFront, Pings
from sglang_router.picker.messages import METHOD, SERVICE, ProcessingRequest, ProcessingResponse
from sglang_router.routing.events import Finished, Listener, WorkerChanged
from stack import Stack, stack

WITHIN = 60.0
BODY = b'{"model":"m","prompt":"hello there"}'


class Chosen(NamedTuple):
    """The answer to a request's headers. body: what is given back of it."""

    endpoint: str
    metadata: str
    sets: dict[str, str]
    removes: list[str]
    body: bytes


class Refused(NamedTuple):
    """The whole answer of the router."""

    status: int
    fields: dict[str, str]
    body: bytes


class Asked:
    """One stream."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        call = channel.stream_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )
        self.call = call(iter(self._messages.get, None), timeout=WITHIN)

    def send(self, message: Any) -> None:
        self._messages.put(message)

    def head(self, path: str, end: bool = False, method: str = "POST", **fields: str) -> Any:
        """Send the head of a request; return the message, which may be changed before by `prepared`."""
        self.send(request_head(path, end, method, **fields))

    def body(self, data: bytes, end: bool = True) -> None:
        message = ProcessingRequest()
        message.request_body.body = data
        message.request_body.end_of_stream = end
        self.send(message)

    def receive(self) -> Any:
        """Return the next reply; None when the stream has ended well."""
        return next(self.call, None)

    def choice(self) -> Chosen:
        """Return where the request goes, with the body that is given back."""
        reply = self.receive()
        assert reply.WhichOneof("kind") == "request_headers", reply
        mutation = reply.request_headers.response.header_mutation
        sets = {each.header.key: each.header.raw_value.decode() for each in mutation.set_headers}
        assert all(each.append_action == 2 for each in mutation.set_headers)
        told = reply.dynamic_metadata.fields["envoy.lb"].struct_value.fields
        key = "x-gateway-destination-endpoint"
        return Chosen(sets.pop(key), told[key].string_value, sets, [*mutation.remove_headers], b"")

    def given_back(self) -> bytes:
        """Return the body of the request as the worker gets it."""
        body, end = b"", False
        while not end:
            streamed = self.receive().request_body.response.body_mutation.streamed_response
            body, end = body + streamed.body, streamed.end_of_stream
        return body

    def refusal(self) -> Refused:
        reply = self.receive()
        assert reply.WhichOneof("kind") == "immediate_response", reply
        answer = reply.immediate_response
        fields = {each.header.key: each.header.raw_value.decode() for each in answer.headers.set_headers}
        assert self.receive() is None
        return Refused(answer.status.code, fields, answer.body)

    def answer(self, status: int, *pieces: bytes, served: str = "", **fields: str) -> dict[str, str]:
        """Send a worker's answer; check that each piece comes back at once; return the fields added to its head."""
        self.send(answer_head(status, not pieces, served, **fields))
        reply = self.receive()
        assert reply.WhichOneof("kind") == "response_headers", reply
        mutation = reply.response_headers.response.header_mutation
        for place, piece in enumerate(pieces, 1):
            assert self.piece(piece, place == len(pieces)) == piece
        return {each.header.key: each.header.raw_value.decode() for each in mutation.set_headers}

    def piece(self, data: bytes, end: bool) -> bytes:
        """Send a piece of an answer's body; return what the client gets of it."""
        message = ProcessingRequest()
        message.response_body.body = data
        message.response_body.end_of_stream = end
        self.send(message)
        streamed = self.receive().response_body.response.body_mutation.streamed_response
        assert streamed.end_of_stream is end
        return bytes(streamed.body)

    def close(self) -> None:
        """Half-close, as a gateway does when a request is over, and wait for the end."""
        self._messages.put(None)
        assert self.receive() is None

    def cancel(self) -> None:
        """Reset the stream, as a gateway does when its client leaves."""
        self.call.cancel()
        self._messages.put(None)


def request_head(path: str, end: bool = False, method: str = "POST", **fields: str) -> Any:
    """Return the message with the head of a request."""
    message = ProcessingRequest()
    head = message.request_headers
    given = {":method": method, ":path": path, ":authority": "gateway", ":scheme": "http", **fields}
    for name, value in given.items():
        head.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    head.end_of_stream = end
    message.protocol_config.request_body_mode = message.protocol_config.response_body_mode = 4
    return message


def with_subset(message: Any, *endpoints: str) -> Any:
    """Add the endpoints to which the gateway restricts the choice."""
    entry = message.metadata_context.filter_metadata.add(key="envoy.lb.subset_hint")
    listed = entry.value.fields["x-gateway-destination-endpoint-subset"].list_value
    listed.SetInParent()
    for endpoint in endpoints:
        listed.values.add(string_value=endpoint)
    return message


def answer_head(status: int, end: bool = False, served: str = "", **fields: str) -> Any:
    """Return the message with the head of an answer. served: the endpoint whose answer it is."""
    message = ProcessingRequest()
    head = message.response_headers
    for name, value in {":status": str(status), **fields}.items():
        head.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    head.end_of_stream = end
    if served:
        entry = message.metadata_context.filter_metadata.add(key="envoy.lb")
        entry.value.fields["x-gateway-destination-endpoint-served"].string_value = served
    return message


class Gateway:
    """See the module."""

    def __init__(self, channel: grpc.Channel, front: PickerFront) -> None:
        self.channel = channel
        self.front = front

    def open(self) -> Asked:
        """Open a stream on which nothing is sent yet."""
        return Asked(self.channel)

    def ask(self, path: str, body: bytes = b"", method: str = "POST", **fields: str) -> Asked:
        """Send a request."""
        asked = self.open()
        asked.head(path, not body, method, **fields)
        if body:
            asked.body(body)
        return asked


@contextlib.contextmanager
def picker(router: Stack, pings: Pings = Pings()) -> Iterator[Gateway]:  # noqa: B008  (immutable)
    """Serve gateways beside a router."""
    front = PickerFront(router.loop, pings)
    router.app.args.epp_port = free_port()
    router.call(lambda: front.attach(router.app))
    router.run(front.open())
    with grpc.insecure_channel(f"127.0.0.1:{router.app.args.epp_port}") as channel:
        try:
            yield Gateway(channel, front)
        finally:
            router.call(front.cut)
            router.run(front.close())


class Ends(Listener):
    """Keeps what is told of requests that ended, and of workers that changed."""

    def __init__(self) -> None:
        self.seen: list[Finished] = []
        self.changes: list[tuple[str, str]] = []

    def finished(self, event: Finished) -> None:
        self.seen.append(event)

    def worker_changed(self, event: WorkerChanged) -> None:
        self.changes.append((event.what, event.new))


class Scene(NamedTuple):
    router: Stack
    gateway: Gateway
    urls: list[str]
    ends: Ends

    @property
    def endpoints(self) -> list[str]:
        return [url.removeprefix("http://") for url in self.urls]

    def idle(self) -> bool:
        return not self.router.router.leases and not any(worker.load for worker in self.router.fleet)

    def ended(self, times: int = 1) -> Finished:
        """Wait until so many requests have ended and no load is left; return the last end."""
        self.router.until(lambda: len(self.ends.seen) >= times and self.idle())
        assert len(self.ends.seen) == times
        return self.ends.seen[-1]


@contextlib.contextmanager
def scene(**settings: Any) -> Iterator[Scene]:
    workers, pings = settings.pop("workers", 2), settings.pop("pings", Pings())
    with stack(policy=settings.pop("policy", "round_robin"), **settings) as router:
        ends = Ends()
        router.call(lambda: router.app.listeners.add(ends))
        fakes = router.fakes(*[{} for _ in range(workers)])
        with picker(router, pings) as gateway:
            yield Scene(router, gateway, [fake.url for fake in fakes], ends)


def wake(here: Scene) -> bool:
    """Have the condition checked again: the budget tells nobody of what it holds."""
    here.router.loop.call_later(0.01, here.router.news.set)
    return False
