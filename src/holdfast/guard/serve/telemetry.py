"""What a server tells of itself: metrics for Prometheus, and a log of JSON lines.

No text of prompts or answers stands in either, unless it is asked for.
"""

import json
import logging
import queue
import sys
import time
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
KEPT = 10_000
"""Lines that may wait for a log that nobody reads; further ones are dropped."""


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "holdfast"}
        self.requests = Counter(
            "requests", "Requests by route and status.", ["route", "status"], **own
        )
        self.latency = Histogram(
            "request_seconds", "Seconds per request.", ["route"], buckets=SECONDS, **own
        )
        self.first = Histogram(
            "first_piece_seconds",
            "Seconds from request to first piece of the answer.",
            buckets=SECONDS,
            **own,
        )
        self.step = Histogram(
            "step_seconds", "Seconds per step of the batch.", buckets=SECONDS, **own
        )
        self.rows = Histogram(
            "step_rows",
            "Rows per step of the batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            **own,
        )
        self.tokens = Counter(
            "tokens", "Tokens by kind: prompt, written, read.", ["kind"], **own
        )
        self.fired = Counter(
            "fired", "Answers on which the guard fired.", ["policy", "channel"], **own
        )
        self.faults = Counter(
            "unwatched", "Answers that could not be watched.", ["on_fault"], **own
        )
        self.gone = Counter("clients_gone", "Clients that left an answer.", **own)
        self.refused = Counter(
            "turned_away", "Requests that were turned away.", ["why"], **own
        )
        self.chunk = Histogram(
            "sidecar_seconds",
            "Seconds by which reading along delays a chunk of an upstream.",
            buckets=SECONDS,
            **own,
        )
        self.upstream = Counter(
            "upstream_failures", "Answers that an upstream broke off.", ["why"], **own
        )
        self.running = Gauge("running", "Rows that are being written.", **own)
        self.waiting = Gauge("waiting", "Requests that wait for room.", **own)


class _Lines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Dropping(QueueHandler):
    """A handler that never waits: a log that is not read stops nobody."""

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


def start_log(stream: TextIO | None = None) -> QueueListener:
    """Let the server's loggers write JSON lines, by a thread of their own."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Lines())
    waiting: queue.Queue[Any] = queue.Queue(KEPT)
    listener = QueueListener(waiting, handler)
    for name in ("holdfast.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_Dropping(waiting)], False
        logger.setLevel(logging.INFO if name == "holdfast.serve" else logging.WARNING)
    listener.start()
    return listener


def log(logger: logging.Logger, event: str, message: str = "", **fields: Any) -> None:
    """Write one line."""
    logger.info(message or event, extra={"event": event, "fields": fields})


class Clock:
    """Seconds since it began."""

    def __init__(self) -> None:
        """Begin now."""
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds since."""
        return time.perf_counter() - self.began
