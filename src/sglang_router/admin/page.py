"""docs/endpoints.md, made of the tables of endpoints."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_router.access.permissions import AccessKind
from sglang_router.admin.routes import ROUTES
from sglang_router.admin.rows import RelayedRow, plain_path, relayed_rows

_HEAD = """\
# Endpoints

Made by `python -m sglang_router.admin.app --markdown` from the tables in `admin/routes.py` and `routing/facts.py`:
edit those, not this page.

Every error of the router has one shape, `{"error": {"message", "type", "code", "param"}}`, and its code is in the
header `x-smg-error-code`, too. Every answer has `x-request-id`. A path that takes GET takes HEAD as well.

The column "for" says who may ask once keys are configured; see [security.md](security.md). The relayed paths are for
clients.

## Relayed to a worker

The policy chooses the worker; body and answer pass byte for byte. The routing text consists of the fields named here,
in this order.

| method | path | routing text |
|---|---|---|"""

_WHO = {
    AccessKind.PUBLIC: "everybody",
    AccessKind.INFERENCE: "clients",
    AccessKind.CONTROL_READ: "user",
    AccessKind.CONTROL_CHANGE: "admin",
}


def markdown() -> str:
    """The whole page."""
    return "\n".join((_HEAD, *map(_relayed, relayed_rows()), *_control(), ""))


def _relayed(row: RelayedRow) -> str:
    text = ", ".join(f"`{name}`" for name in row.text)
    reason = "none: the cache does not matter" if row.json else "none: the router does not read the body"
    if row.about:
        reason = "none: it goes to the worker that keeps the response"
    return f"| {row.method} | `{plain_path(row.path)}` | {text or reason} |"


def _control() -> Iterator[str]:
    for group, rows in ROUTES.items():
        yield from ("", f"## {group}", "", "| method | path | for | |", "|---|---|---|---|")
        for row in rows:
            yield f"| {', '.join(row.methods)} | `{plain_path(row.path)}` | {_WHO[row.kind]} | {row.about} |"
