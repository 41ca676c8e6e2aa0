"""`sglang-router explain ID`: ask a running router why a request got its worker, and print that for people.

    exit status   0   the decision was found and printed
                  1   the router keeps no decision about this request
                  2   the command line cannot be used
                  3   no router answers there
                  4   the router does not let this key read its control plane

Everything that a client chose (id, model, session) is escaped where a terminal would not print it. Keys are never
printed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import ssl
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import msgspec

from sglang_router.errors import ConfigError
from sglang_router.routing.assignment import HOLDER
from sglang_router.routing.considered import Considered
from sglang_router.routing.decision_record import DecisionAttempt, DecisionRecord
from sglang_router.routing.excluded import REASONS
from sglang_router.routing.roles import REGULAR
from sglang_router.routing.sessions import BRANCH
from sglang_router.words import counted

NOT_FOUND, NO_ROUTER, NOT_ALLOWED = 1, 3, 4
URL_VARIABLE, KEY_VARIABLE = "SGLANG_ROUTER_URL", "SGLANG_ROUTER_API_KEY"
_URL = "http://127.0.0.1:30000"
_TIMEOUT = 10.0
_MOST = 1 << 24
"""Bytes of an answer."""

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the decoder raises for content that is no JSON, or no record."""

BRANCHES = {
    "hit": "it is believed to have the longest part of the prompt cached",
    "miss": "no worker is known to have enough of the prompt, and it had the least cached, or cost the least",
    "spill": "another worker has a longer part of the prompt cached, but this one costs less",
    "capped": "another worker has a longer part of the prompt cached, but too many requests (--cost-load-cap)",
    "imbalance": "loads were too far apart, and it had the fewest requests in flight",
    "no_text": "the request has no prompt to compare, and it had the fewest requests in flight",
    "least": "it had the fewest requests in flight",
    "turn": "it was its turn",
    "random": "it was drawn at random",
    "two": "it had fewer requests in flight than the other one that was drawn",
    "only": "there was no other candidate",
    "key": "the routing key belongs to it",
    "no_key": "the request has no routing key, and it had the fewest requests in flight",
    "prefix": "the hash of the beginning of the prompt belongs to it",
    "overflow": "the worker of that hash was overloaded",
    "vacant": "the routing key was new",
    "occupied_hit": "the routing key is assigned to it",
    "occupied_miss": "the workers to which the routing key is assigned were no candidates",
    BRANCH: "the context of the session is there",
    HOLDER: "it keeps the response that the request follows",
    "adopted": "an earlier process of the router had chosen it",
}
"""What the branches mean: those of the policies, and of what sends requests to a worker before they are asked."""


_NO_URL = "--url is not a URL such as http://127.0.0.1:30000"


class _Failed(Exception):
    """No decision can be shown: the message says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def main(words: Sequence[str], prog: str) -> int:
    """Run the command; return its exit status."""
    options = _parser(prog).parse_args(words)
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE, "")
    url = options.url or os.environ.get(URL_VARIABLE) or _URL
    try:
        content = _ask(url, options.id, key.strip(), options.ca_cert)
        record = msgspec.json.decode(content, type=DecisionRecord)
    except _Failed as failed:
        print("error:", failed, file=sys.stderr)
        return failed.status
    except _UNREADABLE:
        print(f"error: what answers at {shown(url)} is no router that explains decisions.", file=sys.stderr)
        return NO_ROUTER
    if options.json:
        print(escaped(msgspec.json.format(content, indent=2).decode()))
    else:
        print("\n".join(lines(record)))
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show why a request got its worker, and what came of it. The router keeps the last decisions"
        " (--decision-records); a request with the header `x-sglang-router-explain: 1` leaves all details.",
        epilog="exit status: 0 shown, 1 not found, 2 wrong options, 3 no router answers, 4 not allowed",
    )
    parser.add_argument("id", metavar="ID", help="id of the request: x-request-id of its answer")
    parser.add_argument("--url", help=f"where the router is; by default the variable {URL_VARIABLE}, or {_URL}")
    about_key = f"a key that may read the control plane; by default the variable {KEY_VARIABLE}"
    parser.add_argument("--api-key", metavar="KEY", help=about_key)
    parser.add_argument("--ca-cert", metavar="FILE", help="trust the certificates in this file, for https")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    return parser


# -- the question ------------------------------------------------------------------------------------------------------


def _ask(url: str, request_id: str, key: str, ca_cert: str | None) -> bytes:
    """Return the router's answer about a request.

    Raises: _Failed, when it has none; ConfigError, when the options cannot be used.
    """
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    if scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise ConfigError(_NO_URL)
    if not key.isascii() or not key.isprintable():
        raise ConfigError("--api-key is not visible ASCII")
    path = f"{parts.path.rstrip('/')}/decisions/{quote(request_id, safe='', errors='surrogateescape')}"
    try:
        with contextlib.closing(_connection(scheme, host, port, ca_cert)) as connection:
            connection.request("GET", path, headers={"authorization": f"Bearer {key}"} if key else {})
            answer = connection.getresponse()
            status, content = answer.status, answer.read(_MOST)
    except UnicodeError:
        raise ConfigError(_NO_URL) from None
    except (OSError, http.client.HTTPException) as error:
        why = shown(str(error).strip() or type(error).__name__)
        raise _Failed(NO_ROUTER, f"no router answers at {shown(url)}: {why}.") from None
    if status == 200:
        return content
    told = f" It says: {message}" if (message := _message(content)) else ""
    if status in (401, 403):
        with_key = "this key" if key else "anybody without a key (--api-key)"
        raise _Failed(NOT_ALLOWED, f"the router at {shown(url)} does not let {with_key} read decisions.{told}")
    if status == 404 and not _is_unknown_path(answer.headers.get("x-smg-error-code", "")):
        why = "the id is wrong, the request never came there, or it is too long ago (--decision-records)"
        raise _Failed(NOT_FOUND, f"the router at {shown(url)} keeps no decision about {shown(request_id)}: {why}.")
    if status == 409:
        raise _Failed(NOT_FOUND, f"the router at {shown(url)} keeps no decisions.{told}")
    raise _Failed(NO_ROUTER, f"what answers at {shown(url)} cannot explain decisions: status {status}.{told}")


def _connection(scheme: str, host: str, port: int | None, ca_cert: str | None) -> http.client.HTTPConnection:
    if scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    try:
        trusted = ssl.create_default_context(cafile=ca_cert)
    except OSError as error:
        raise ConfigError(f"--ca-cert {ca_cert}: {error.strerror or error}") from None
    return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT, context=trusted)


def _is_unknown_path(code: str) -> bool:
    """Whether a 404 says nothing of the request: the router is older than this command, or something else answers."""
    return code != "decision_not_found"


class _Detail(msgspec.Struct):
    message: str = ""


class _Error(msgspec.Struct):
    error: _Detail


def _message(content: bytes) -> str:
    """Return the message of an error of the router; "" for any other content."""
    try:
        return shown(msgspec.json.decode(content, type=_Error).error.message)
    except _UNREADABLE:
        return ""


# -- the answer --------------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """Return a text as a terminal may print it."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def escaped(text: str) -> str:
    """Return JSON text with escapes in place of what a terminal would not print, but newlines."""
    return "".join([char if char.isprintable() or char == "\n" else _escape(char) for char in text])


def _escape(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join([f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)])


def lines(record: DecisionRecord) -> Iterator[str]:
    """Yield the lines that explain a decision, as a terminal may print them."""
    return map(shown, _lines(record))


def _lines(record: DecisionRecord) -> Iterator[str]:
    yield f"Request {shown(record.id)}"
    about = [record.endpoint, *(["stream"] if record.stream else [])]
    about += [f"model {shown(record.model)}"] if record.model else []
    about += [f"session {shown(record.session)}"] if record.session else []
    yield f"  what      {', '.join(about)}, {counted(record.body_bytes, 'byte')}, at {_moment(record.at)}"
    if record.prefill_worker is not None:
        yield f"  prefill   {record.prefill_worker}: {_why(record.prefill_branch)}"
    yield f"  worker    {_who(record)}"
    if record.total:
        yield f"  cache     {_share(record.matched, record.total)} of the prompt was believed to be cached there"
    if record.served_model is not None:
        yield f"  served by {shown(record.served_model)}, which is an alias's model or stands in for it"
    yield f"  outcome   {', '.join(_outcome(record))}"
    if record.prompt_tokens is not None:
        yield f"  tokens    {', '.join(_tokens(record))}"
    for attempt in record.attempts:
        yield ""
        yield from _attempt(attempt)
    if not record.attempts:
        yield ""
        yield "Nothing more was recorded: send the header `x-sglang-router-explain: 1` with a request to see all that"
        yield "was looked at, or start the router with --decision-table-every 1."


def _who(record: DecisionRecord) -> str:
    if record.worker is None:
        return "none was asked"
    return f"{record.worker}, by {record.policy}: {_why(record.branch)}"


def _why(branch: str) -> str:
    return f"{branch} ({BRANCHES[branch]})" if branch in BRANCHES else shown(branch)


def _outcome(record: DecisionRecord) -> Iterator[str]:
    yield record.outcome
    if record.status:
        yield f"status {record.status}"
    if record.code:
        yield f"error {record.code}"
    if record.retries:
        yield "1 retry" if record.retries == 1 else f"{record.retries} retries"
    if record.first_byte is not None:
        yield f"first byte after {_seconds(record.first_byte)}"
    yield f"{_seconds(record.duration)} in all"


def _tokens(record: DecisionRecord) -> Iterator[str]:
    yield f"{record.prompt_tokens} of prompt"
    if record.cached_tokens is not None:
        yield f"{_share(record.cached_tokens, record.prompt_tokens or 0)} of them cached, as the engine says"
    if record.completion_tokens is not None:
        yield f"{record.completion_tokens} of completion"


def _moment(at: float) -> str:
    try:
        moment = datetime.fromtimestamp(at, timezone.utc)
    except (OverflowError, OSError, ValueError):  # what answers is no router
        return f"{at:.3g} seconds after 1970"
    return f"{moment.replace(tzinfo=None).isoformat(sep=' ', timespec='milliseconds')} UTC"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1.0 else f"{seconds:.2f} s"


def _share(part: int, whole: int) -> str:
    return f"{part * 100 // whole}% ({part:,} of {whole:,})" if whole else f"{part:,}"


class _Row(NamedTuple):
    """A line of the table."""

    mark: str
    worker: str
    cached: str
    backlog: str
    cost: str
    load: str
    note: str = ""


_HEAD = _Row("", "worker", "cached", "wait", "cost", "in flight")


def _attempt(attempt: DecisionAttempt) -> Iterator[str]:
    ended = f": {attempt.outcome}" if attempt.outcome else ", in flight"
    among = counted(attempt.candidates, "candidate")
    role = f" ({attempt.role})" if attempt.role != REGULAR else ""
    yield f"Attempt {attempt.attempt}{role}, after {_seconds(attempt.at)}, among {among}{ended}"
    rows = [_HEAD, *(_row(each, attempt) for each in _best_first(attempt)), *map(_excluded, attempt.excluded)]
    yield from _table(rows)
    left_out = attempt.candidates - len(attempt.considered)
    if left_out > 0:
        yield f"    and {counted(left_out, 'candidate')} more"
    shadow = attempt.shadow
    if shadow is not None:
        same = "the same worker" if shadow.worker == attempt.worker else shadow.worker
        costs = ""
        if shadow.cost is not None and shadow.actual_cost is not None:
            costs = f", at a cost of {shadow.cost:.4g} in place of {shadow.actual_cost:.4g}"
        yield f"    {shadow.policy} would have chosen {same}: {_why(shadow.branch)}{costs}"


def _best_first(attempt: DecisionAttempt) -> list[Considered]:
    def rank(each: Considered) -> tuple[bool, float, int, int]:
        return each.worker != attempt.worker, each.cost if each.cost is not None else 0.0, -each.matched, each.load

    return sorted(attempt.considered, key=rank)


def _row(each: Considered, attempt: DecisionAttempt) -> _Row:
    chosen = each.worker == attempt.worker
    return _Row(
        "->" if chosen else "",
        each.worker,
        _share(each.matched, attempt.total) if attempt.total else "-",
        "-" if each.backlog is None else _seconds(each.backlog),
        "-" if each.cost is None else f"{each.cost:.4g}",
        str(each.load),
        f"chosen: {shown(attempt.branch)}" if chosen else "",
    )


def _excluded(each: Considered) -> _Row:
    return _Row("", each.worker, "", "", "", str(each.load), REASONS.get(each.excluded, shown(each.excluded)))


def _table(rows: Iterable[_Row]) -> Iterator[str]:
    """Yield the rows in columns; figures are right-aligned, and columns without any figure are left out."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    kept = [column for column in columns if any(cell not in ("", "-") for cell in column[1:])]
    widths = [max(map(len, column)) for column in kept]
    texts = [column in (columns[0], columns[1], columns[-1]) for column in kept]
    for cells in zip(*kept, strict=True):
        padded = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(cells, widths, texts, strict=True)
        ]
        yield f"  {'  '.join(padded)}".rstrip()
