"""Every error the router itself answers with, in one place, ordered by who can mend it.

An error is an exception with an HTTP status, a stable `code` for programs, a `type` in OpenAI's vocabulary and a
message for people that says what to do. `RouterError.body()` is the only place that knows the shape of an error answer:

    {"error": {"message": "...", "type": "...", "code": "...", "param": null}}

The code is also sent in the header `x-smg-error-code` (the reference router's name for it). Answers of workers are not
errors of the router: they pass through as they are.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class RouterError(Exception):
    """An answer made by the router. `retry_after` is in seconds; `close` ends the client's connection after it."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    message: ClassVar[str] = "The router failed to handle this request; its log says why."
    close: ClassVar[bool] = False
    challenge: ClassVar[str] = ""
    """The answer's WWW-Authenticate field, if it has one."""

    def __init__(self, message: str = "", *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message or self.message)
        self.param = param
        self.retry_after = retry_after

    def body(self) -> bytes:
        """The JSON body, in the shape the OpenAI clients understand."""
        return msgspec.json.encode(
            {"error": {"message": str(self), "type": self.type, "code": self.code, "param": self.param}}
        )


# -- what the client can mend ------------------------------------------------------------------------------------------


class InvalidRequest(RouterError):
    status = 400
    code = "invalid_request"
    type = "invalid_request_error"
    message = "The request is not valid."


class InvalidJSON(InvalidRequest):
    code = "json_parse_error"
    message = "The body is not a JSON object."


class BadHTTP(InvalidRequest):
    """The bytes are not an HTTP/1.1 message (RFC 9112), or one that two parsers could read in two ways."""

    code = "bad_http"
    message = "This is not a well-formed HTTP/1.1 request."
    close = True


class AccessRefused(InvalidRequest):
    """The key does not open this door (RFC 6750 3)."""

    challenge = 'Bearer realm="sglang-router"'


class Unauthorized(AccessRefused):
    status = 401
    code = "invalid_api_key"
    message = "This key is not known here."


class MissingKey(Unauthorized):
    code = "missing_api_key"
    message = "A key is needed: send it as `Authorization: Bearer KEY`, or in the header x-api-key."


class Forbidden(AccessRefused):
    status = 403
    code = "forbidden"
    type = "permission_error"
    message = "This key does not reach that far."


class NotFound(InvalidRequest):
    status = 404
    code = "not_found"
    message = "There is nothing at this path."


class WorkerNotFound(NotFound):
    code = "WORKER_NOT_FOUND"
    message = "No worker has this id."


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"
    message = "This path does not take this method."


class RequestTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"
    message = "The request did not arrive in time."
    close = True


class QueueTimeout(RouterError):
    status = 408
    code = "queue_timeout"
    type = "timeout_error"
    message = "The request waited for its turn longer than --queue-timeout-secs allows; try again later."


class Conflict(InvalidRequest):
    status = 409
    code = "conflict"
    message = "This is at odds with what the router holds."


class PayloadTooLarge(InvalidRequest):
    status = 413
    code = "payload_too_large"
    message = "The body is larger than --max-payload-size allows."
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
    """Well-formed JSON that does not say what it must."""

    status = 422
    code = "unprocessable"


class HeadTooLarge(InvalidRequest):
    status = 431
    code = "head_too_large"
    message = "The header block is larger than --max-head-bytes or --max-header-count allows."
    close = True


class Overload(RouterError):
    """The router has enough to do; `retry_after` says when to come again."""

    status = 429
    type = "rate_limit_error"


class RateLimited(Overload):
    code = "rate_limited"
    message = "More requests per second than --rate-limit-tokens-per-second allows; slow down."


class QueueFull(Overload):
    code = "queue_full"
    message = "As many requests wait already as --queue-size allows; try again later."


class TooManyWaiting(Overload):
    code = "too_many_waiting"
    message = "Too many requests wait already until a worker is ready."


class BufferFull(Overload):
    code = "buffer_full"
    message = "The router holds as many bytes of requests as --max-buffered-request-bytes allows; try again later."


class UpgradeRefused(InvalidRequest):
    status = 501
    code = "upgrade_not_supported"
    message = "The router speaks HTTP/1.1 only: no Upgrade, no CONNECT, no HTTP/2 without negotiation."
    close = True


class VersionNotSupported(InvalidRequest):
    status = 505
    code = "http_version_not_supported"
    message = "The router speaks HTTP/1.1 and HTTP/1.0."
    close = True


# -- what the operator can mend ----------------------------------------------------------------------------------------


class Unavailable(RouterError):
    """No worker may take the request now. `retry_after` says when one may."""

    status = 503
    code = "no_available_workers"
    type = "service_unavailable"
    message = "No worker can take this request: all are unhealthy, draining or held off by their circuit breakers."


class NoWorkers(Unavailable):
    code = "no_workers"
    message = (
        "No workers are registered. Start the router with --worker-urls, or POST /add_worker?url=http://host:port."
    )


class WorkersStarting(Unavailable):
    code = "workers_starting"
    message = "All workers are still starting."


class WorkersFull(Unavailable):
    """The request may wait for one to have room."""

    code = "workers_full"
    message = "All workers have as many requests as --max-running-per-worker allows."


class TooManyConnections(Unavailable):
    code = "too_many_connections"
    message = "The router holds as many connections as it has descriptors for; raise its limit (ulimit -n)."
    close = True


class ShuttingDown(Unavailable):
    code = "shutting_down"
    message = "The router is shutting down."
    close = True


class WorkerBroken(RouterError):
    status = 502
    code = "worker_broken"
    type = "server_error"
    message = "The worker broke off before it answered."


class WorkerUnreachable(WorkerBroken):
    code = "worker_unreachable"
    message = "The worker could not be reached."


class WorkerInvalid(WorkerBroken):
    code = "worker_invalid_response"
    message = "The worker's answer is not well-formed HTTP."


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
    message = "The worker began no answer within --first-byte-timeout-secs."


class StreamSilent(WorkerTimeout):
    code = "chunk_timeout"
    message = "The worker fell silent inside its answer for longer than --chunk-timeout-secs."


class Overdue(WorkerTimeout):
    code = "request_overdue"
    message = "The request took longer than --request-timeout-secs allows."


class StreamBroken(WorkerBroken):
    """Sent as an event inside a stream: the head is gone already, so its status is never seen."""

    code = "stream_broken"
    message = "The worker broke off in the middle of its answer."


class InternalError(RouterError):
    """A fault of the router itself."""


class ConfigError(Exception):
    """A mistake in options or files: ends the command with one line and exit status 2."""
