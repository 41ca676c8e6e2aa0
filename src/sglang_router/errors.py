"""All errors that the router answers with, ordered by who can fix them: the client, or the operator.

An error is an exception with an HTTP status, a stable `code` for programs, a `type` in OpenAI's vocabulary and a
message for people that says what to do. Only `RouterError.body` knows the shapes of an error answer:

    {"error": {"message": "...", "type": "...", "code": "...", "param": null}}      OpenAI's, on every path but these:
    {"type": "error", "error": {"type": "...", "message": "..."}}                   Anthropic's, on /v1/messages
    {"error": "..."}                                                                Ollama's, on /api

The code is also sent in the header `x-smg-error-code` (the reference router's name for it). Error answers of workers
are not in this file: they pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import msgspec

_MESSAGES = b"/v1/messages"
_OLLAMA = b"/api/"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Anthropic's type for a status. Of the others, the client's mistakes are `invalid_request_error`, the rest
`api_error`."""


def speaks_anthropic(path: bytes) -> bool:
    """Return whether clients of this path expect Anthropic's shapes."""
    return path.startswith(_MESSAGES) and path[len(_MESSAGES) : len(_MESSAGES) + 1] in b"/"


class RouterError(Exception):
    """An answer made by the router.

    param        the field of the request that is wrong, if it is one
    retry_after  seconds until the client should try again; sent as Retry-After
    close        close the client's connection after the answer
    fields       further header fields of the answer
    """

    status: int = 500
    code: str = "internal_error"
    type: str = "server_error"
    message: ClassVar[str] = "The router failed to handle this request. See the router's log for the reason."
    close: ClassVar[bool] = False
    fields: tuple[tuple[str, str], ...] = ()

    def __init__(self, message: str = "", *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message or self.message)
        self.param = param
        self.retry_after = retry_after

    def body(self, path: bytes = b"") -> bytes:
        """Return the JSON body, in the shape that clients of this path understand."""
        if speaks_anthropic(path):
            return msgspec.json.encode(
                {"type": "error", "error": {"type": self._anthropic_type(), "message": str(self)}}
            )
        if path.startswith(_OLLAMA):
            return msgspec.json.encode({"error": str(self)})
        return msgspec.json.encode(
            {"error": {"message": str(self), "type": self.type, "code": self.code, "param": self.param}}
        )

    def _anthropic_type(self) -> str:
        clients = self.status < 500 or self.type == InvalidRequest.type
        return _ANTHROPIC_TYPES.get(self.status) or (InvalidRequest.type if clients else "api_error")


# -- errors that the client can fix ------------------------------------------------------------------------------------


class InvalidRequest(RouterError):
    status = 400
    code = "invalid_request"
    type = "invalid_request_error"
    message = "The request is not valid."


class InvalidJSON(InvalidRequest):
    code = "json_parse_error"
    message = "The body is not a JSON object."


class ReservedField(InvalidRequest):
    code = "reserved_field"
    message = "This field is set by the router."

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The field {name!r} is set by routers only: leave it out. An operator who trusts all clients can start the"
            " router with --trust-client-routing-fields.",
            param=name,
        )


class BadHTTP(InvalidRequest):
    """The bytes are not an HTTP/1.1 message (RFC 9112), or two parsers could read them differently."""

    code = "bad_http"
    message = "This is not a well-formed HTTP/1.1 request."
    close = True


class SeveralAnswers(InvalidRequest):
    """Pairs of SGLang workers hang at it, and their memory is lost."""

    code = "several_answers"
    message = (
        "A pair of prefill and decode workers writes one answer of a prompt, and this model has no other workers. Send"
        " n=1, or several requests."
    )


class AccessRefused(InvalidRequest):
    """The request has no key, an unknown key, or a key without the needed role (RFC 6750, section 3)."""

    fields = (("www-authenticate", 'Bearer realm="sglang-router"'),)


class Unauthorized(AccessRefused):
    status = 401
    code = "invalid_api_key"
    message = "This API key is not known here. Ask the operator of this router for a valid key."


class MissingKey(Unauthorized):
    code = "missing_api_key"
    message = "An API key is required: send it as `Authorization: Bearer KEY`, or in the header x-api-key."


class ExpiredKey(Unauthorized):
    code = "expired_api_key"
    message = "This API key has expired. Ask the operator of this router for another one."


class InvalidToken(Unauthorized):
    """A token of the identity provider that does not count (RFC 6750 3.1)."""

    code = "invalid_token"
    message = "The token is not accepted, and the message says why."
    fields = (("www-authenticate", 'Bearer realm="sglang-router", error="invalid_token"'),)

    def __init__(self, reason: str = "it cannot be read") -> None:
        super().__init__(f"The token is not accepted: {reason}.")


class TokenKeysMissing(AccessRefused):
    """The issuer's public keys, or the one that signed the token, are being fetched."""

    status = 503
    code = "token_keys_unavailable"
    type = "service_unavailable"
    message = "The router has not got the key yet with which to check this token: the issuer is being asked. Try again."


class Forbidden(AccessRefused):
    status = 403
    code = "forbidden"
    type = "permission_error"
    message = "The API key does not permit this request."


class ModelNotAllowed(Forbidden):
    """The entry of the client's key in the keys file names the models that it may ask for."""

    code = "model_not_allowed"
    message = "The API key does not permit this model. Name one that it permits in the field `model`."


class HostNotAllowed(Forbidden):
    """A browser asked by a name that somebody else may own, for what needs no key (`access.host_names`)."""

    code = "host_not_allowed"
    message = "What needs no key is not for browsers that call the router by this name; the message says what to do."

    def __init__(self, name: str = "this name") -> None:
        super().__init__(
            f"The router does not know {name!r} as a name of its own, and without a key it answers browsers only by"
            " a name that no other web page can have. Open it by its IP address or over https, name the host in"
            " --control-plane-allowed-hosts, or start the router with --control-plane-api-keys."
        )


class NotFound(InvalidRequest):
    status = 404
    code = "not_found"
    message = "The router has no endpoint at this path."


class WorkerNotFound(NotFound):
    code = "WORKER_NOT_FOUND"
    message = "No worker has this id. GET /workers lists all workers."


class DecisionNotFound(NotFound):
    code = "decision_not_found"
    message = (
        "No decision about a request with this id is kept: the id is wrong, the request never came here, or it is too"
        " long ago (--decision-records)."
    )


class ModelNotFound(NotFound):
    """Only where the router serves several models, or with --enable-igw; else the engine decides."""

    code = "model_not_found"
    message = "No worker serves this model. GET /v1/models lists those that are served."


class ModelRequired(InvalidRequest):
    code = "model_required"
    message = "This router serves several models: name one in the field `model`. GET /v1/models lists them."


class MethodNotAllowed(InvalidRequest):
    """`allow`: the methods that the path takes (RFC 9110 15.5.6)."""

    status = 405
    code = "method_not_allowed"
    message = "This endpoint does not accept this method."

    def __init__(self, *, allow: Iterable[str] = ()) -> None:
        super().__init__()
        self.fields = (("allow", ", ".join(allow)),)


class RequestTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"
    message = "The request did not arrive in time."
    close = True


class QueueTimeout(RouterError):
    status = 408
    code = "queue_timeout"
    type = "timeout_error"
    message = "The request was queued for longer than --queue-timeout-secs. Try again later."


class Conflict(InvalidRequest):
    status = 409
    code = "conflict"
    message = "The request conflicts with the router's current state."


class PayloadTooLarge(InvalidRequest):
    status = 413
    code = "payload_too_large"
    message = "The body is larger than --max-payload-size or --max-buffered-request-bytes allows."
    close = True


class URITooLong(InvalidRequest):
    status = 414
    code = "uri_too_long"
    message = "The request line is larger than --max-head-bytes allows."
    close = True


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"
    message = "The body must be sent without Content-Encoding."


class Unprocessable(InvalidRequest):
    """The body is well-formed JSON, but a field is missing or has an invalid value."""

    status = 422
    code = "unprocessable"


class ConfigRefused(InvalidRequest):
    """The file, the keys or the certificates cannot be used, so a reload changed nothing."""

    status = 422
    code = "config_refused"
    message = "The configuration cannot be used, and nothing was changed."


class RequestBreaksWorkers(Unprocessable):
    """A request like this one ended the connections of two workers a short time ago, and perhaps the workers."""

    code = "request_breaks_workers"
    message = (
        "This request broke the workers that it was sent to, so it is refused for a while."
        " Change it, or try again after the time in Retry-After."
    )


class HeadTooLarge(InvalidRequest):
    status = 431
    code = "head_too_large"
    message = "The request's headers are larger than --max-head-bytes, or more than --max-header-count."
    close = True


class Overload(RouterError):
    """The router is overloaded. `retry_after` says in how many seconds to try again."""

    status = 429
    type = "rate_limit_error"


class RateLimited(Overload):
    code = "rate_limited"
    message = "There are more requests per second than --rate-limit-tokens-per-second allows. Send fewer."


class RequestsLimited(Overload):
    """The limit of one client or one model, see docs/limits.md; so are the next two."""

    code = "requests_limited"
    message = "There are more requests per second than this key or this model may have. Send fewer."


class ConcurrencyLimited(Overload):
    code = "concurrency_limited"
    message = "There are as many requests in flight as this key or this model may have. Wait until one ends."


class TokensLimited(Overload):
    code = "tokens_limited"
    message = "The tokens per minute that this key or this model may have are used up. Try again later."


class QueueFull(Overload):
    code = "queue_full"
    message = "The queue is full: --queue-size requests are queued already. Try again later."


class TooManyWaiting(Overload):
    code = "too_many_waiting"
    message = "All workers are starting or paused, and too many requests are queued already. Try again later."


class SessionsFull(Overload):
    code = "sessions_full"
    message = (
        "The workers have no room for another session: the contexts of the live ones fill their caches, and this one"
        " waited for --session-wait-secs, or too many wait already. Try again later."
    )


class BufferFull(Overload):
    code = "buffer_full"
    message = (
        "The body found no room beside others for as long as a request may be queued: --max-buffered-request-bytes"
        " limits how much the router holds. Try again later."
    )


class TooManyTunnels(Overload):
    code = "too_many_websockets"
    message = "--max-tunnels WebSockets are open already. Try again later."


class UpgradeRequired(InvalidRequest):
    """The path has a WebSocket, and nothing else."""

    status = 426
    code = "upgrade_required"
    message = (
        "This path is a WebSocket of version 13: ask for it with `Connection: Upgrade`, `Upgrade: websocket` and"
        " `Sec-WebSocket-Version: 13`."
    )
    fields = (("upgrade", "websocket"), ("sec-websocket-version", "13"))


class NoWebSocketKey(InvalidRequest):
    """A request for a WebSocket without its one key, or with one that is none (RFC 6455, section 4.1)."""

    code = "bad_websocket_key"
    message = "A request for a WebSocket has one Sec-WebSocket-Key: 16 random bytes in base64, which are 24 characters."


class WebSocketUnserved(InvalidRequest):
    """Neither half of a pair answers at a WebSocket: each waits for the other one."""

    code = "websocket_not_served"
    message = (
        "Pairs of prefill and decode workers serve no WebSockets, and this model has no other workers. An operator can"
        " add a regular worker."
    )


class OriginRefused(AccessRefused):
    """A page of another site asks for a WebSocket. Browsers let every page do that, and send no preflight."""

    status = 403
    code = "origin_not_allowed"
    message = "Pages of this origin may not open WebSockets here. An operator can allow it: --cors-allowed-origins."


class UpgradeRefused(InvalidRequest):
    status = 501
    code = "upgrade_not_supported"
    message = "The router supports HTTP/1.1 only. It does not support Upgrade, CONNECT or HTTP/2."
    close = True


class VersionNotSupported(InvalidRequest):
    status = 505
    code = "http_version_not_supported"
    message = "The router supports HTTP/1.1 and HTTP/1.0 only."
    close = True


class LoopDetected(InvalidRequest):
    """The request carries this router's own mark in its Via field (RFC 9110 7.6.3, RFC 5842 7.2)."""

    status = 508
    code = "loop_detected"
    message = (
        "This request has been through this router already: one of its workers is the router itself, or another router"
        " that sends requests back to it. Remove that worker."
    )


# -- errors that the operator can fix ----------------------------------------------------------------------------------


class Unavailable(RouterError):
    """No worker can take the request now. `retry_after` says in how many seconds one may be able to."""

    status = 503
    code = "no_available_workers"
    type = "service_unavailable"
    message = "No worker can take this request: all are unhealthy, draining, ejected, or have an open circuit breaker."


class NoWorkers(Unavailable):
    code = "no_workers"
    message = (
        "No workers are registered. Start the router with --worker-urls, or POST /add_worker?url=http://host:port."
    )


class WorkersStarting(Unavailable):
    code = "workers_starting"
    message = "All workers are still starting. Try again later."


class WorkersPaused(Unavailable):
    """Every worker that could serve is paused. The router queues the request until one continues."""

    code = "workers_paused"
    message = (
        "All workers are paused by the control plane: generation is paused, or their memory is released. Continue them"
        " with the request that undoes that, or POST /workers/{id}/resume."
    )


class WorkersFull(Unavailable):
    """Every worker has its most requests. The router queues the request until one of them ends."""

    code = "workers_full"
    message = "Each worker has --max-running-per-worker requests already. Try again later."


class TooManyConnections(Unavailable):
    code = "too_many_connections"
    message = "The router has no file descriptors left for this connection. Raise its limit (ulimit -n)."
    close = True


class DeciderGone(Unavailable):
    """With --relay-processes: the process that decides is being restarted, or does not answer."""

    code = "decider_gone"
    message = "The process of the router that decides does not answer. It is restarted when it has ended. Try again."


class ShuttingDown(Unavailable):
    code = "shutting_down"
    message = "The router is shutting down."
    close = True


class WorkerBroken(RouterError):
    status = 502
    code = "worker_broken"
    type = "server_error"
    message = "The worker closed the connection before it answered."


class WorkerUnreachable(WorkerBroken):
    code = "worker_unreachable"
    message = "The router could not connect to the worker."


class WorkerInvalid(WorkerBroken):
    code = "worker_invalid_response"
    message = "The worker's answer is not well-formed HTTP."


class PrefillFailed(WorkerBroken):
    """The prefill worker of a pair answered with a failing status: the code is `prefill_` and what the status says."""

    code = "prefill_error"
    message = "The prefill worker did not prefill the prompt."

    def __init__(self, status: int = 502, body: bytes = b"", retry_after: bytes | None = None) -> None:
        """status: the worker's; body: of its answer, JSON if it is an engine's; retry_after: its Retry-After."""
        super().__init__(f"The prefill worker answered with status {status}{_said(body)}.")
        if retry_after is not None and retry_after.isdigit():
            self.retry_after = float(retry_after[:9])
        if 400 <= status < 600:
            self.status = status
            self.code = PREFILL_CODES.get(status, "prefill_error")
            if status < 500:
                self.type = InvalidRequest.type


PREFILL_CODES = {
    400: "prefill_bad_request",
    404: "prefill_not_found",
    500: "prefill_internal_error",
    502: "prefill_bad_gateway",
    503: "prefill_unavailable",
}
_MOST_SAID = 1000
"""Characters of an engine's message that the client is told."""


def _said(body: bytes) -> str:
    """Return the message in the body of an engine's error, with a colon before it; "" without one."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f": {message[:_MOST_SAID].rstrip('.')}" if isinstance(message, str) and message else ""


class WorkerTimeout(RouterError):
    status = 504
    code = "worker_timeout"
    type = "timeout_error"
    message = "The worker did not answer in time."


class ConnectTimeout(WorkerTimeout):
    code = "connect_timeout"
    message = "The worker did not accept a connection within --connect-timeout-secs."


class FirstByteTimeout(WorkerTimeout):
    code = "first_byte_timeout"
    message = "The worker sent no first byte of its answer within --first-byte-timeout-secs."


class StreamSilent(WorkerTimeout):
    code = "chunk_timeout"
    message = "The worker sent nothing more of its answer for --chunk-timeout-secs."


class Overdue(WorkerTimeout):
    code = "request_overdue"
    message = "The request took longer than --request-timeout-secs."


class TunnelIdle(WorkerTimeout):
    """Never sent to a client: its WebSocket is closed."""

    code = "websocket_idle"
    message = "Nothing came from either side of the WebSocket for --tunnel-idle-timeout-secs."


class TunnelOverdue(WorkerTimeout):
    """Never sent to a client, likewise."""

    code = "websocket_overdue"
    message = "The WebSocket was open for --tunnel-max-secs."


class StreamBroken(WorkerBroken):
    """Sent as an event inside a stream. The head has been sent already, so clients never see the status."""

    code = "stream_broken"
    message = "The worker closed the connection in the middle of its answer."


class InternalError(RouterError):
    """The router itself is at fault: a bug."""


class ConfigError(Exception):
    """A mistake in options or files: the command prints one line and exits with status 2."""
