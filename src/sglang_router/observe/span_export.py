"""Sends spans to an OpenTelemetry collector (OTLP), in the background: the SDK's batch processor and its exporter.

At most `MOST` spans wait; what comes while they do is lost. What a collector does not take within `_WITHIN` seconds is
lost, too. Both are counted (`sent`, `lost`), and the first loss in a while is a warning in the log. Nothing here ever
waits on the event loop's thread.

The SDK reads OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, and what its exporters need for credentials and
certificates: OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE and the like.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Sequence

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

log = logging.getLogger("sglang_router.tracing")

GRPC, HTTP = "grpc", "http/protobuf"
MOST = 16384
"""Spans that wait to be sent."""
_BATCH = 512
_EVERY = 500
"""Milliseconds between two batches that are not full."""
_WITHIN = 5
"""Seconds for one batch."""
_QUIET = 60.0
"""Seconds without a loss after which the next one is a warning again."""
_FLUSH = 2.0
"""Seconds that the end of the router waits for the last spans."""


def exporter_of(endpoint: str, protocol: str) -> SpanExporter:
    """Make what sends spans. endpoint: "host:4317", or a URL; https for TLS.

    Raises: ImportError, when the package for this protocol is missing.
    """
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    if protocol == GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGRPC

        return OverGRPC(endpoint=url, insecure=url.startswith("http://"), timeout=_WITHIN)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHTTP

    from sglang_router.observe.collector_session import CollectorSession

    path = "" if url.partition("://")[2].rstrip("/").count("/") else "/v1/traces"
    return OverHTTP(endpoint=url.rstrip("/") + path, timeout=_WITHIN, session=CollectorSession())


class SpanExport:
    """See the module. Implements `observe.tracing.SpanSink`.

    sent  spans that the collector took
    lost  spans that it did not take, or for which there was no room
    """

    def __init__(self, exporter: SpanExporter, endpoint: str, version: str) -> None:
        known = Resource.create({"service.name": "sglang-router", "service.version": version})
        self.resource = known.merge(OTELResourceDetector().detect())
        self.sent = self.lost = 0
        self._put = 0
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._warned = -_QUIET
        self._away = False  # the last batch was lost
        self._exporter = exporter
        # One line of ours says what its loggers would say for each batch.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._processor = BatchSpanProcessor(
            _Counted(exporter, self),
            max_queue_size=MOST,
            schedule_delay_millis=_EVERY,
            max_export_batch_size=_BATCH,
            export_timeout_millis=_WITHIN * 1000,
        )

    def __repr__(self) -> str:
        return f"<SpanExport to {self._endpoint}: {self.sent} sent, {self.lost} lost>"

    def put(self, spans: Iterable[ReadableSpan]) -> None:
        """Take spans, or count them as lost."""
        for span in spans:
            if self._put - self.sent - self.lost >= MOST:
                self.count(0, 1)
                self._put += 1
                continue
            self._put += 1
            self._processor.on_end(span)

    def count(self, sent: int, lost: int) -> None:
        """Count spans; warn of a loss, once in a while. Called from any thread."""
        with self._lock:
            self.sent += sent
            self.lost += lost
            self._away = lost > 0
            now = time.monotonic()
            warns = lost and now - self._warned >= _QUIET
            if lost:
                self._warned = now
        if warns:
            log.warning(
                "traces cannot be sent to %s: spans are dropped, and counted in sgl_router_trace_spans_total"
                " (see --otlp-traces-endpoint, --otlp-traces-protocol)",
                self._endpoint,
            )

    async def close(self) -> None:
        """Send what waits, for a few seconds at most, and end. A collector that is away is not waited for."""
        await asyncio.get_running_loop().run_in_executor(None, self._end)

    def _end(self) -> None:
        if self._away:  # it would be waited for until the last try
            self._exporter.shutdown()
        closing = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(_FLUSH)


class _Counted(SpanExporter):
    """Counts what another exporter sends."""

    def __init__(self, exporter: SpanExporter, counts: SpanExport) -> None:
        self._exporter = exporter
        self._counts = counts

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        try:
            result = self._exporter.export(spans)
        except Exception:  # whatever it is, the next batch is tried again
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self._counts.count(len(spans), 0)
        else:
            self._counts.count(0, len(spans))
        return result

    def shutdown(self) -> None:
        """End."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Return at once: nothing is kept here."""
        return True
