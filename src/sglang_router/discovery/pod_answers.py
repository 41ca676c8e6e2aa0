"""What the API answers about pods: pages of a list, and the events of a watch, as bytes -> records.

{"metadata": {"resourceVersion": "7", "continue": "..."}, "items": [POD, ...]}       one page
{"type": "ADDED", "object": POD}          ADDED, MODIFIED, DELETED (deleted, or its labels do not fit any more)
{"type": "BOOKMARK", "object": {...}}     only metadata.resourceVersion: the watch is alive
{"type": "ERROR", "object": STATUS}       code 410: the version is too old, list again
"""

from __future__ import annotations

from urllib.parse import quote, urlencode

import msgspec

from sglang_router.discovery.pods import PodItem, PodMetadata, PodRules

PAGE = 100
"""Pods of one page: about a megabyte, which is read in a few milliseconds."""


class PodList(msgspec.Struct, kw_only=True):
    """One page of a list."""

    metadata: PodMetadata
    items: list[PodItem] | None = None


class EventObject(PodItem, kw_only=True):
    """The object of an event: a pod, or of an ERROR a Status."""

    metadata: PodMetadata = msgspec.field(default_factory=PodMetadata)
    code: int | None = None
    message: str | None = None


class PodEvent(msgspec.Struct, kw_only=True):
    """One line of a watch."""

    type: str
    object: EventObject


read_page = msgspec.json.Decoder(PodList).decode
"""Decode a page. Raises: msgspec.DecodeError, UnicodeDecodeError."""
read_event = msgspec.json.Decoder(PodEvent).decode
"""Decode a line of a watch. Raises: msgspec.DecodeError, UnicodeDecodeError."""


def pods_path(namespace: str | None) -> str:
    """Return where the pods of a namespace are, or of all."""
    return "/api/v1/pods" if namespace is None else f"/api/v1/namespaces/{quote(namespace, safe='')}/pods"


def list_query(rules: PodRules, following: str | None) -> str:
    """Return the query for a page. following: the token of the page before; None: the first page."""
    query = {"limit": str(PAGE)} | _selector(rules)
    return urlencode(query | ({"continue": following} if following else {}))


def watch_query(rules: PodRules, version: str, seconds: int) -> str:
    """Return the query for what happens after a version, for so many seconds."""
    query = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version, "timeoutSeconds": str(seconds)}
    return urlencode(query | _selector(rules))


def _selector(rules: PodRules) -> dict[str, str]:
    labels = ",".join(f"{key}={value}" for key, value in sorted(rules.common.items()))
    return {"labelSelector": labels} if labels else {}
