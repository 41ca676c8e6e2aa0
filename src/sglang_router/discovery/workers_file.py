"""Workers from a file: YAML or JSON, read again when it changes, and taken whole or not at all.

    workers:
      - http://10.0.0.1:8000                     a URL
      - url: http://10.0.0.2:8000                or its description, with the fields of POST /workers
        model_id: llama
        worker_type: prefill
        bootstrap_port: 8998
        drain: true                              it gets no new requests

A file that cannot be used changes nothing: the workers stay as the last good one named them. It is looked at once a
second, and counts when its last change is a second old, because the first half of a list is a list too. It is read in a
thread of its own, so a large one delays no request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from sglang_router.access.watched import WatchedFiles
from sglang_router.config import option_files, parse_worker_url
from sglang_router.discovery.owner import WorkerOwner
from sglang_router.discovery.progress import LookProgress
from sglang_router.discovery.reconcile import WantedWorker
from sglang_router.errors import ConfigError
from sglang_router.routing.model_names import LONGEST_NAME, is_name
from sglang_router.routing.spec import HIGHEST_PORT

log = logging.getLogger("sglang_router.discovery")

_EVERY: Final = 1.0
"""Seconds between two looks at the file."""
_AGAIN: Final = 30.0
_DRAINED: Final = "its file says drain"


class ListedWorker(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A worker in the file. What is missing has the router's default."""

    url: Annotated[str, msgspec.Meta(max_length=2048)]
    api_key: Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]*\Z")] | None = None
    model_id: Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_NAME)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] | None = None
    cost: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    worker_type: Literal["regular", "prefill", "decode"] | None = None
    bootstrap_port: Annotated[int, msgspec.Meta(ge=1, le=HIGHEST_PORT)] | None = None
    runtime: str | None = None
    labels: dict[str, str] | None = None
    dp_aware: bool | None = None
    drain: bool = False


def read(path: str) -> dict[str, WantedWorker]:
    """Return the workers that a file lists, by URL. Raises: ConfigError; it names no key."""
    found: dict[str, WantedWorker] = {}
    for number, entry in enumerate(_entries(path), 1):
        where = f"{path}: worker {number}"
        if isinstance(entry, str):
            entry = {"url": entry}
        try:
            listed = msgspec.convert(entry, ListedWorker)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: {error}") from None
        try:
            url = parse_worker_url(listed.url)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if url in found:
            raise ConfigError(f"{where}: {url} is there twice")
        if listed.model_id is not None and not is_name(listed.model_id):
            raise ConfigError(f"{where}: `model_id` cannot be the name of a model")
        if listed.bootstrap_port is not None and listed.worker_type != "prefill":
            raise ConfigError(f"{where}: only a prefill worker has a bootstrap_port")
        found[url] = _wanted(url, listed, path)
    return found


def _wanted(url: str, listed: ListedWorker, path: str) -> WantedWorker:
    fields = msgspec.structs.asdict(listed)
    said = {name: value for name, value in fields.items() if value is not None and name not in ("url", "drain")}
    return WantedWorker(url=url, said=said, origin=path, withheld=_DRAINED if listed.drain else "")


def _entries(path: str) -> list[Any]:
    """Return what stands under `workers`. Raises: ConfigError."""
    content = _content(path)
    entries = content.get("workers") if isinstance(content, Mapping) else content
    if not isinstance(entries, list):
        raise ConfigError(f"{path} lists no workers; it needs `workers:` with a list, which may be empty: []")
    return entries


def _content(path: str) -> Any:
    parse = option_files.parse_json if path.lower().endswith(".json") else option_files.parse_yaml
    return option_files.read(Path(path), parse)


class FileSource:
    """See the module. Making it reads the file.

    every  seconds between two looks
    again  seconds after which its workers are named again though it did not change: a worker may have been free since

    Raises: ConfigError
    """

    def __init__(
        self,
        owner: WorkerOwner,
        path: str,
        clock: Callable[[], float],
        every: float = _EVERY,
        again: float = _AGAIN,
    ) -> None:
        self.owner = owner
        self.progress = LookProgress("--discovery-file", clock)
        self._path = path
        self._every = every
        self._again = again
        self._clock = clock
        self._named_at = 0.0
        self._wanted: dict[str, WantedWorker] = {}
        self._files = WatchedFiles([path], self._load, "--discovery-file", log, wall=time.time)

    def __repr__(self) -> str:
        return f"<FileSource {self._path}: {len(self._wanted)} workers, {self.progress!r}>"

    @property
    def looks_at(self) -> str:
        """The file."""
        return self._path

    def _load(self) -> None:
        self._wanted = read(self._path)

    async def run(self) -> None:
        """Follow the file until it is cancelled."""
        await self._follow()
        while True:
            await asyncio.sleep(self._every)
            if await asyncio.to_thread(self._files.refresh) or self._clock() - self._named_at >= self._again:
                await self._follow()
            elif not (complaint := self._files.complaint):
                self.progress.error = ""
                self.progress.listed()
            elif complaint != self.progress.error:  # the log has it from the files
                self.progress.error = complaint
                self.progress.failures["invalid"] += 1

    async def _follow(self) -> None:
        self._named_at = self._clock()
        await self.owner.follow(self._wanted)
        if not self._files.complaint:
            self.progress.error = ""
            self.progress.listed()
