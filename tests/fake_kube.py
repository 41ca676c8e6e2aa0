"""A Kubernetes API server that does what a test tells it: pods, pages, watches, and every way in which they fail.

    api = FakeKube()
    await api.start()                         on the running loop; api.url
    api.create("p1", "127.0.0.21")            ADDED, to every watch whose selector fits
    api.change("p1", ready=False)             MODIFIED; labels that leave a selector are DELETED there
    api.delete("p1", grace=30)                MODIFIED with a deletionTimestamp; finish("p1"), or delete("p1"): DELETED
    api.forget(4)                             versions up to 4 are too old: 410 inside a stream
    api.cut()                                 resets all connections; api.away = True: and new ones
    api.mute()                                what is open stays open and hears nothing any more
    api.end_watches()                         ends them as timeoutSeconds does
    api.refusal = (403, "pods is forbidden")  the answer to everything
    api.tokens = {"t2"}                       which bearer tokens are good; None: any

It keeps what it was asked: `api.lists`, `api.watches` are queries, `api.agents` the user agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Item = dict[str, Any]


@dataclass(eq=False)
class _Watch:
    writer: asyncio.StreamWriter
    namespace: str
    selector: dict[str, str]
    plural: str = "pods"
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, kind: str, item: Item) -> None:
        line = json.dumps({"type": kind, "object": item}).encode() + b"\n"
        self.writer.write(b"%x\r\n%b\r\n" % (len(line), line))


class FakeKube:
    """See the module."""

    def __init__(self) -> None:
        self.pods: dict[tuple[str, str], Item] = {}
        self.version = 0
        self.refusal: tuple[int, str] | None = None
        self.watch_refusal: tuple[int, str] | None = None
        self.tokens: set[str] | None = None
        self.away = False
        self.has_pools = True
        self.dumb = False
        self.lists: list[dict[str, str]] = []
        self.watches: list[dict[str, str]] = []
        self.agents: set[str] = set()
        self.asked = asyncio.Event()
        self.watching: list[_Watch] = []
        self.port = 0
        self._oldest = 0
        self._uids = 0
        self._history: list[tuple[int, Item | None, Item]] = []  # version, before, after
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self.port}"

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        """Listen; again at the same port after `stop`."""
        self._tls = tls
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close everything, as when the API server ends."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- pods ----------------------------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        ip: str | None = None,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
        ready: bool = True,
        namespace: str = "llm",
    ) -> str:
        """Create a pod; return its uid."""
        self._uids += 1
        item = {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": f"uid-{self._uids}",
                "labels": {"app": "engine"} if labels is None else labels,
                "annotations": annotations,
                "creationTimestamp": f"2026-11-28T00:00:{self._uids:02d}Z",
            },
            "status": _status(ip, ready),
        }
        self._put((namespace, name), item)
        return f"uid-{self._uids}"

    def change(
        self,
        name: str,
        ip: str | None = None,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
        ready: bool | None = None,
        phase: str = "",
        namespace: str = "llm",
    ) -> None:
        """Change what is given."""
        item = copy.deepcopy(self.pods[namespace, name])
        if labels is not None:
            item["metadata"]["labels"] = labels
        if annotations is not None:
            item["metadata"]["annotations"] = annotations
        if ready is not None:
            item["status"] = _status(ip or item["status"].get("podIP"), ready)
        if phase:
            item["status"]["phase"] = phase
        self._put((namespace, name), item)

    def delete(self, name: str, grace: int = 0, namespace: str = "llm") -> None:
        """Delete a pod: at once, or with a grace, after which `finish` ends it."""
        item = copy.deepcopy(self.pods[namespace, name])
        item["metadata"]["deletionTimestamp"] = "2026-11-28T00:01:00Z"
        self._put((namespace, name), item)
        if not grace:
            self.finish(name, namespace)

    def finish(self, name: str, namespace: str = "llm") -> None:
        """Remove a pod that ends."""
        before = self.pods.pop((namespace, name))
        after = copy.deepcopy(before)
        after["metadata"]["gone"] = True
        self._happened(before, after)

    def _put(self, key: tuple[str, str], item: Item) -> None:
        before = self.pods.get(key)
        self.pods[key] = item
        self._happened(before, item)

    def _happened(self, before: Item | None, after: Item) -> None:
        self.version += 1
        after["metadata"]["resourceVersion"] = str(self.version)
        self._history.append((self.version, before, after))
        for watch in self.watching:
            _tell(watch, before, after)

    def pool(self, name: str, labels: dict[str, str], *ports: int, namespace: str = "llm") -> None:
        """Create an InferencePool, or change it; `delete` deletes it as it does pods."""
        spec = {"selector": {"matchLabels": labels}, "targetPorts": [{"number": port} for port in ports]}
        metadata = {"name": name, "namespace": namespace, "labels": None}
        self._put((namespace, name), {"kind": "InferencePool", "metadata": metadata, "spec": spec})

    # -- trouble -------------------------------------------------------------------------------------------------------

    def forget(self, version: int) -> None:
        """Let versions up to this one be too old."""
        self._oldest = version

    def bookmark(self) -> None:
        """Send a bookmark to all watches."""
        for watch in self.watching:
            watch.send("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(self.version)}})

    def say(self, line: bytes) -> None:
        """Send any line to all watches."""
        for watch in self.watching:
            watch.writer.write(b"%x\r\n%b\r\n" % (len(line) + 1, line + b"\n"))

    def end_watches(self) -> None:
        """End all watches in order."""
        for watch in self.watching:
            watch.ended.set()

    def mute(self) -> None:
        """Let all watches stay open, and say nothing any more."""
        self.watching.clear()

    def cut(self) -> None:
        """Reset all connections."""
        self.watching.clear()
        for writer in self._writers:
            sock = writer.get_extra_info("socket")  # None: its peer has closed it
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        if self.away:
            self.cut()
            return
        try:
            while head := await _head(reader):
                if not self.dumb:
                    await self._answer(head, writer)
        except (OSError, asyncio.CancelledError):
            pass  # cut, or stopped
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        line, *fields = head.split("\r\n")
        target = urlsplit(line.split(" ")[1])
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in fields)}
        query = dict(parse_qsl(target.query))
        self.agents.add(headers["user-agent"])
        watch = "watch" in query
        (self.watches if watch else self.lists).append(query)
        self.asked.set()
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if self.tokens is not None and token not in self.tokens:
            return self._refuse(writer, 401, "Unauthorized")
        refusal = self.refusal or (self.watch_refusal if watch else None)
        if refusal is not None:
            return self._refuse(writer, *refusal)
        parts = target.path.strip("/").split("/")
        namespace = parts[-2] if "namespaces" in parts else ""
        plural = parts[-1]
        if plural not in ("pods", "inferencepools") or (plural == "inferencepools" and not self.has_pools):
            return self._refuse(writer, 404, "the server could not find the requested resource")
        selector = dict(each.split("=", 1) for each in query.get("labelSelector", "").split(",") if each)
        if watch:
            return await self._watch(writer, query, _Watch(writer, namespace, selector, plural))
        return self._list(writer, query, _Watch(writer, namespace, selector, plural))

    def _refuse(self, writer: asyncio.StreamWriter, status: int, message: str) -> None:
        body = json.dumps({"kind": "Status", "message": message, "code": status}).encode()
        _send(writer, status, body)

    def _list(self, writer: asyncio.StreamWriter, query: dict[str, str], which: _Watch) -> None:
        found = [item for item in self.pods.values() if _fits(item, which)]
        start, limit = int(query.get("continue", "0")), int(query.get("limit", "0")) or len(found) + 1
        page, rest = found[start : start + limit], found[start + limit :]
        metadata = {"resourceVersion": str(self.version)} | ({"continue": str(start + limit)} if rest else {})
        _send(writer, 200, json.dumps({"kind": "PodList", "metadata": metadata, "items": page or None}).encode())

    async def _watch(self, writer: asyncio.StreamWriter, query: dict[str, str], watch: _Watch) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        since = int(query["resourceVersion"])
        if since < self._oldest:
            watch.send("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
            watch.ended.set()
        else:
            for version, before, after in self._history:
                if version > since:
                    _tell(watch, before, after)
            self.watching.append(watch)
            self.asked.set()
        await watch.ended.wait()
        if watch in self.watching:
            self.watching.remove(watch)
        writer.write(b"0\r\n\r\n")


def _status(ip: str | None, ready: bool) -> Item:
    return {
        "phase": "Running" if ip else "Pending",
        "podIP": ip,
        "conditions": [{"type": "Ready", "status": "True" if ready and ip else "False"}],
    }


def _fits(item: Item | None, which: _Watch) -> bool:
    if item is None or "gone" in item["metadata"]:
        return False
    labels = item["metadata"]["labels"] or {}
    kind = "inferencepools" if item.get("kind") == "InferencePool" else "pods"
    here = which.namespace in ("", item["metadata"]["namespace"])
    return kind == which.plural and here and which.selector.items() <= labels.items()


def _tell(watch: _Watch, before: Item | None, after: Item) -> None:
    """Send the event that a change is for this watch."""
    was, fits = (_fits(each, watch) for each in (before, after))
    if fits:
        watch.send("MODIFIED" if was else "ADDED", after)
    elif was:
        watch.send("DELETED", after)


async def _head(reader: asyncio.StreamReader) -> str:
    try:
        return (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return ""


def _send(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


class KubeThread:
    """A FakeKube on a loop in a thread of its own, for routers in other processes. `do` runs functions there."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.api = FakeKube()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> KubeThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.api.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def do(self, *functions: Callable[[], Any]) -> Any:
        async def there() -> Any:
            return [function() for function in functions][-1]

        return self.run(there())
