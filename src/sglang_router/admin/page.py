"""docs/endpoints.md, made of the tables of endpoints."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_router.access.permissions import AccessKind
from sglang_router.admin.routes import ROUTES
from sglang_router.admin.rows import RelayedRow, plain_path, relayed_rows

_HEAD = """\
# Endpoints

Every path that the router answers: those that it relays to a worker, and its own, by which workers are added, drained
and looked at. The commands of [cli.md](cli.md) use the latter; `GET /docs` shows them with all fields.

Made by `python -m sglang_router.admin.app --markdown` from the tables in `admin/routes.py` and `routing/endpoints.py`:
edit those, not this page.

Every error of the router has one shape, `{"error": {"message", "type", "code", "param"}}` (on `/v1/messages` and `/api`
that of Anthropic and of Ollama), and its code is in the header `x-smg-error-code`, too. Every answer has
`x-request-id`. A path that takes GET takes HEAD as well.

The column "for" says who may ask once keys are configured; see [security.md](security.md). The relayed paths are for
clients.

## Relayed to a worker

The policy chooses the worker; body and answer pass byte for byte. The routing text consists of the fields named here,
in this order. The worker must serve the model that the body or the form names; where it says *any worker*, the model
may be missing, or stand in the query (`?model=`).

What a worker keeps (responses, conversations, files, batches) is asked for at that worker: the router remembers the
last 65,536 ids that answers gave, and asks the workers in turn about any other, until one answers something else than
404. A batch goes to the worker that keeps its `input_file_id`. Files are not copied between workers, and end with them.

What creates or changes something (*sent once*) goes on a new connection, and is sent to another worker only if the
first one has refused the connection or answered that it is busy (429, 503 with Retry-After). Uploads are relayed
unchanged, up to `--max-payload-size`; each is in memory while it is sent.

The numbers of `/slots` are those of one engine: with several workers, ask the engine itself, or use a policy that keeps
a routing key at one worker (`manual`, `consistent_hashing`) and send `x-smg-routing-key`. Streams of `/api/generate`
and `/api/chat` are lines of JSON: a first line with an `error` is retried like a status 500; one that breaks between
two lines ends with such a line, and without a clean end. `/parse/{name}` is the reference router's own; here an engine
must have it. SGLang's engines have `/parse_function_call` and `/separate_reasoning` for the same.

With `--relay-unknown-paths`, requests for paths that are not on this page are relayed too, whatever their method, to
any worker and unread: no model, no prompt, no reserved field is looked for. Clients then reach all that the engines
serve, such as `/sleep` or `/collective_rpc` of vLLM, so set it only where every client may. Not relayed are other
spellings of the router's own paths (`/%77orkers`, `/workers/`), and paths with `..`, `//`, a backslash or a doubly
encoded character.

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
    endpoint = row.endpoint
    text = ", ".join(f"`{name}`" for name in endpoint.text)
    reason = "none: the cache does not matter" if endpoint.json else "none: the router does not read the body"
    if endpoint.form:
        reason = "none: the router reads the model in the form"
    if endpoint.about:
        reason = "none: it goes to the worker that keeps this"
    elif endpoint.anywhere:
        reason += "; any worker"
    if endpoint.links and not endpoint.text:
        reason = f"none: it goes to the worker that keeps `{endpoint.links[0]}`"
    if endpoint.once and row.method == "POST":
        reason += "; sent once"
    return f"| {row.method} | `{plain_path(row.path)}` | {text or reason} |"


def _control() -> Iterator[str]:
    for group, rows in ROUTES.items():
        yield from ("", f"## {group}", "", "| method | path | for | |", "|---|---|---|---|")
        for row in rows:
            yield f"| {', '.join(row.methods)} | `{plain_path(row.path)}` | {_WHO[row.kind]} | {row.about} |"
