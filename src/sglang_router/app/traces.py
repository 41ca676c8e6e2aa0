"""Make the parts that trace requests (--enable-trace), which need the packages of the extra `otel`.

They are imported here, and only when the options ask for them: else nothing is imported, and nothing is done.

    ids_of        in each process: the ids that engines are told
    export_of     in the deciding process: what sends spans
    tracing_of    there: the listener that makes them
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from sglang_router.config import RouterArgs
from sglang_router.errors import ConfigError
from sglang_router.routing.events import Listener
from sglang_router.routing.router import Router
from sglang_router.routing.trace_ids import TraceIds
from sglang_router.version import __version__

_INSTALL = "pip install 'sglang-router[otel]'"


class Export(Protocol):
    """What sends spans, see `observe.span_export`."""

    sent: int
    lost: int

    @property
    def resource(self) -> Any:
        """What emits the spans."""

    def put(self, spans: Iterable[Any]) -> None:
        """Take spans, or count them as lost."""

    async def close(self) -> None:
        """Send what waits, for a few seconds at most, and end."""


def ids_of(args: RouterArgs, mark: bytes) -> TraceIds | None:
    """Make what tells the ids of traces; None when the options do not ask for traces. mark: this router in Via."""
    return TraceIds(mark, args.trace_sample_ratio) if args.enable_trace else None


def export_of(args: RouterArgs) -> Export | None:
    """Make what sends spans, and start its thread; None when the options do not ask for traces.

    Raises: ConfigError, when a package is missing.
    """
    if not args.enable_trace:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the packages' own use of one another
            from sglang_router.observe.span_export import SpanExport, exporter_of

            exporter = exporter_of(args.otlp_traces_endpoint, args.otlp_traces_protocol)
    except ImportError as error:
        raise ConfigError(f"--enable-trace needs OpenTelemetry's packages ({error}): {_INSTALL}") from None
    return SpanExport(exporter, args.otlp_traces_endpoint, __version__)


def tracing_of(args: RouterArgs, router: Router, ids: TraceIds, export: Export, clock: Callable[[], float]) -> Listener:
    """Make the listener that makes spans, and let the router tell it how legs end."""
    from sglang_router.observe.tracing import Tracing

    tracing = Tracing(ids, export, clock, (args.host, args.port), args.server_cert_path is not None)
    router.tracer = tracing.leg_ended
    return tracing
