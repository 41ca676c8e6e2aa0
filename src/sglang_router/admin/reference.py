"""docs/errors.md and docs/headers.md, made of `errors.py` and of the tables of headers.

    python -m sglang_router.admin.reference --errors > docs/errors.md
    python -m sglang_router.admin.reference --headers > docs/headers.md

A class of errors with a `code` of its own is a row. Names of headers come from the modules that read and write them;
what each means stands here, and a test finds every name in the sources that has no row
(`tests/admin/test_reference.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sglang_router.access.origins import OWN_PAGE
from sglang_router.errors import (
    PREFILL_CODES,
    InvalidRequest,
    Overload,
    QueueTimeout,
    RequestBreaksWorkers,
    RouterError,
    StreamBroken,
    TokenKeysMissing,
    TunnelIdle,
    TunnelOverdue,
)
from sglang_router.routing.session_hints import HEADERS as SESSION_HEADERS
from sglang_router.wire.headers import HOP_BY_HOP, OVERRIDE, ROUTING, WHITELIST
from sglang_router.wire.request_id import EXPLAIN, MOST_PRIORITY, PRIORITIES, PRIORITY, REQUEST_ID_HEADERS


class Header(NamedTuple):
    """One row of docs/headers.md. name: in lower case, or several names; meaning: for operators, in Markdown."""

    name: str
    meaning: str


def _named(*names: str | bytes) -> str:
    """Return names as one cell of a table."""
    return ", ".join(f"`{name if isinstance(name, str) else name.decode()}`" for name in names)


_PRIORITY_NAMES = _named(*PRIORITIES)
READ = (
    Header(
        "`authorization`, `x-api-key`",
        "The client's key (`Bearer KEY`, or the key alone): [security.md](security.md). Without keys in the router,"
        " `authorization` is passed on to a worker that has no key of its own (`--worker-api-key`).",
    ),
    Header(
        _named(*REQUEST_ID_HEADERS),
        "The request's id, from the first of them that is there (`--request-id-headers`). Without one the router makes"
        " an id. It is in the answer, in the access log, and what `sglang-router explain` is asked for.",
    ),
    Header(
        _named(*SESSION_HEADERS),
        "The session that the request belongs to, from the first of them that is there (`--session-headers`):"
        " [sessions.md](sessions.md). `x-smg-routing-key` is also the key of the policies `manual` and"
        " `consistent_hashing`.",
    ),
    Header(
        _named(PRIORITY),
        f"How soon a queued request begins: a number from -{MOST_PRIORITY} to {MOST_PRIORITY}, or {_PRIORITY_NAMES}:"
        " [limits.md](limits.md).",
    ),
    Header(_named(EXPLAIN), "`1`: tell in the answer which worker was chosen and why: [explaining.md](explaining.md)."),
    Header(
        "`traceparent`, `tracestate`",
        "The trace that the request belongs to (W3C). With `--enable-trace` the router's spans join it:"
        " [monitoring.md](monitoring.md).",
    ),
    Header(
        "`via`",
        "The proxies and routers before this one. A request that has this router's own mark goes in a circle: 508,"
        " `loop_detected`.",
    ),
    Header("`accept`", "On `/`, `/overview` and `/metrics`: a page, JSON, an event stream, or OpenMetrics."),
    Header("`expect`", "`100-continue`: the router answers `100` itself as soon as it wants the body."),
    Header("`content-encoding`", "Refused with 415: the router must be able to read the body."),
    Header(
        "`origin`, `sec-fetch-site`",
        "Which site a browser asks for. A page of another site may change nothing ([page.md](page.md)), open no"
        " WebSocket, and read no answer, unless `--cors-allowed-origins` names it.",
    ),
    Header("`sec-websocket-protocol`", "`openai-insecure-api-key.KEY`: how browsers send a key with a WebSocket."),
    Header(_named(OWN_PAGE), "The page for operators sets it, so that its requests are known as its own."),
    Header(
        "`x-client-request-id`",
        "Not read: each request has another one. `--session-headers` refuses it for that reason.",
    ),
)
"""What the router reads of a client's request."""
TO_WORKERS = (
    Header(
        "`x-request-id`",
        "The request's id, the same as in the answer; with `--pd-kv-connector nixl_push`, 17 characters longer.",
    ),
    Header("`via`", "`1.1 sglang-router-` and this process's mark, behind those of earlier proxies."),
    Header("`authorization`", "The worker's own key (`--worker-api-key`), or see the table above."),
    Header("`x-data-parallel-rank`", "The data-parallel rank that the router has chosen (`--dp-aware`)."),
    Header("`traceparent`", "With `--enable-trace`: this attempt's own span."),
    Header("`host`, `content-length`", "Written anew: they concern one connection."),
)
"""What the router adds to a request for a worker."""
TO_CLIENTS = (
    Header("`x-request-id`", "The request's id. Every answer has it."),
    Header("`x-smg-error-code`", "The code of the router's own error: [errors.md](errors.md)."),
    Header("`retry-after`", "In how many seconds to try again. With every error that passes by itself."),
    Header(
        "`x-sglang-router-decision`, `x-sglang-router-worker`",
        "Why this worker, and which: for `x-sglang-router-explain: 1`, or always with `--decision-headers`.",
    ),
    Header("`x-sglang-router-model`", "The model that served, where it is another one than the client has named."),
    Header(
        "`x-ratelimit-limit-*`, `x-ratelimit-remaining-*`, `x-ratelimit-reset-*`",
        "For a client with a rate, of `requests` and of `tokens`: how many may come at once, how many of them now, and"
        " when it will be all of them again: [limits.md](limits.md#what-is-refused).",
    ),
    Header("`www-authenticate`", "With 401 and 403: a key is missing, unknown, or has not the role."),
    Header("`allow`", "With 405: the methods that the path takes."),
    Header("`upgrade`", "With 426: the path is a WebSocket."),
    Header("`location`", "With 201 or 202 of the control plane: where what was made can be looked at."),
    Header("`access-control-*`, `vary`", "Which pages may read the answer (`--cors-allowed-origins`)."),
    Header(
        "`content-security-policy`, `x-content-type-options`, `x-frame-options`, `referrer-policy`, `cache-control`",
        "On the router's own pages (`/`, `/docs`).",
    ),
)
"""What the router adds to an answer for a client."""
WEBHOOK = (
    Header("`x-sglang-router-timestamp`", "When it was sent: seconds since 1970."),
    Header(
        "`x-sglang-router-signature`",
        "`sha256=` and the HMAC of the timestamp, a dot and the body (`--scale-webhook-secret`).",
    ),
)
"""What the scaling webhook sends."""
GATEWAYS = (
    Header(
        "`x-gateway-destination-endpoint`",
        "To the gateway, with metadata of the same name: where the request goes. A client's own is replaced.",
    ),
    Header("`x-gateway-destination-endpoint-subset`", "In the gateway's metadata: the only endpoints it may go to."),
    Header("`x-gateway-destination-endpoint-served`", "In the gateway's metadata: the endpoint that has answered."),
    Header("`x-forwarded-for`", "The last address counts as the client's, because the gateway has added it."),
)
"""What an endpoint picker and its gateway tell each other (picker.asked)."""

_ERRORS_HEAD = """\
# Errors

What the router answers when it cannot do what a request asks for. A program should look at the **code**, which is
stable; the message is for people and may change. Symptoms, causes and what to do about them:
[troubleshooting.md](troubleshooting.md).

Made by `python -m sglang_router.admin.reference --errors > docs/errors.md` from `errors.py`; do not edit by hand.

| path | shape of the body |
|---|---|
| `/v1/messages` | `{"type": "error", "error": {"type": "...", "message": "..."}}` (Anthropic) |
| `/api/...` | `{"error": "..."}` (Ollama) |
| all others | `{"error": {"message": "...", "type": "...", "code": "...", "param": null}}` (OpenAI) |

The code is also in the header `x-smg-error-code`, on every path. An answer with an error status and **without** this
header is the worker's own: the router passes it on as it came. Inside a stream, whose status has been sent already, an
error is an event in the same shapes, and the stream ends without a clean end. Errors that pass by themselves have
`Retry-After`, as far as the router knows when; what a client should do then stands in
[overload.md](overload.md#errors-and-what-a-client-should-do).
"""
_CHANGE = "The request must be changed"
_LATER = "Limits, and what passes by itself: try again later"
_NO_ANSWER = "No worker could answer"
_UNSEEN = "Never the status of an answer: in streams, and in the log"
_SECTIONS: dict[type[RouterError], str] = {
    StreamBroken: _UNSEEN,
    TunnelIdle: _UNSEEN,
    TunnelOverdue: _UNSEEN,
    TokenKeysMissing: _LATER,
    RequestBreaksWorkers: _LATER,
    InvalidRequest: _CHANGE,
    Overload: _LATER,
    QueueTimeout: _LATER,
    RouterError: _NO_ANSWER,
}
"""Where a class stands, by the first of these that it comes from."""
_ERRORS_TABLE = """
| status | code | type | message |
|---|---|---|---|
"""
_HEADERS_HEAD = """\
# Headers

Which header fields the router reads, passes on, adds and removes. Names are in lower case here; case does not matter.

Made by `python -m sglang_router.admin.reference --headers > docs/headers.md`; do not edit by hand.
"""


def error_classes(of: type[RouterError] = RouterError) -> Iterator[type[RouterError]]:
    """Return the classes of errors that have a code of their own, in the order of `errors.py`."""
    if "code" in vars(of):
        yield of
    for each in of.__subclasses__():
        yield from error_classes(each)


def errors() -> str:
    """Return docs/errors.md."""
    found = sorted(error_classes(), key=lambda each: (each.status, each.code))
    parts = [_ERRORS_HEAD]
    for title in (_CHANGE, _LATER, _NO_ANSWER, _UNSEEN):
        rows = [_error_row(each) for each in found if _section_of(each) == title]
        parts.append(f"\n## {title}\n{_ERRORS_TABLE}" + "".join(rows))
    codes = ", ".join(f"`{code}` ({status})" for status, code in PREFILL_CODES.items())
    parts.append(
        "\nWhen the prefill worker of a pair fails, its status is passed on with a code that says so: "
        f"{codes}; any other is `prefill_error`. The message quotes the worker.\n"
    )
    return "".join(parts)


def _section_of(each: type[RouterError]) -> str:
    return next(title for base, title in _SECTIONS.items() if issubclass(each, base))


def _error_row(each: type[RouterError]) -> str:
    message = each.message.replace("|", "\\|")
    return f"| {each.status} | `{each.code}` | `{each.type}` | {message} |\n"


def headers() -> str:
    """Return docs/headers.md."""
    parts = [_HEADERS_HEAD]
    parts += _section("What clients may send, and what the router does with it", READ)
    parts += _section("What workers get besides", TO_WORKERS)
    parts += _section("What the router adds to answers", TO_CLIENTS)
    parts += _section("What the scaling webhook sends", WEBHOOK)
    parts += _section("Between an endpoint picker and its gateway", GATEWAYS)
    parts.append(
        f"""
## What is passed on to workers

By default: {_named(*sorted(WHITELIST))}, `x-request-id-*`, and `authorization` as said above. With
`--forward-headers all`: every field but these.

| never passed on | why |
|---|---|
| {_named(*sorted(HOP_BY_HOP))}, and what `connection` names | they concern one connection |
| {_named(*sorted(ROUTING), OVERRIDE + b"*")} | they choose an engine or a rank: `--trust-client-routing-fields` |
| `x-api-key`, `authorization` | where clients have keys here: these keys are the router's |
| keys of the control plane, in any field | no worker may learn them |

Of a worker's answer everything is passed on but `connection` and its like, `x-request-id` (the router's is the same),
and `x-sglang-router-*`, where the router sets them itself.
"""
    )
    return "".join(parts)


def _section(title: str, rows: Sequence[Header]) -> Iterator[str]:
    yield f"\n## {title}\n\n| header | meaning |\n|---|---|\n"
    for row in rows:
        yield f"| {row.name} | {row.meaning} |\n"


_PAGES = {"--errors": errors, "--headers": headers}


def main(argv: Sequence[str]) -> int:
    """Print one of the pages."""
    page = _PAGES.get(argv[0]) if len(argv) == 1 else None
    if page is None:
        sys.stderr.write("usage: python -m sglang_router.admin.reference --errors | --headers\n")
        return 2
    sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
