"""Structured logging to standard error. Events are short names with fields; no field holds a prompt or token ids.

A line that cannot be written (a full disk, a closed pipe) is counted and left out: a log must not end what it describes.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, TextIO

import structlog

from matrixinfer.config import LogConfig
from matrixinfer.errors import MatrixInferError
from matrixinfer.telemetry.intervals import Intervals

_MAX_FRAMES = 20
_LIBRARY_SECONDS = 10.0
"""How often a library's message of one kind is logged."""


class LogStream:
    """Writes to `stream`, each line in one piece, as other processes may write there too. Counts what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = threading.local()
        self.dropped = 0
        """Lines that could not be written."""

    def write(self, text: str) -> int:
        """Write `text`, if that is possible, once its line is complete."""
        line = getattr(self._begun, "line", "") + text
        if not text.endswith("\n"):
            self._begun.line = line
            return len(text)
        self._begun.line = ""
        try:
            self._stream.write(line)
            return len(text)
        except (OSError, ValueError):  # the latter: the stream has been closed
            self.dropped += 1
            return 0

    def flush(self) -> None:
        """Write what is buffered, if that is possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.dropped += 1

    def isatty(self) -> bool:
        """Whether people read along."""
        return not self._stream.closed and self._stream.isatty()


class _Libraries(logging.Filter):
    """Keeps what libraries log short and free of data: they quote what a peer sent, also in their errors."""

    def __init__(self) -> None:
        super().__init__()
        self._may_log = Intervals(_LIBRARY_SECONDS, time.monotonic)

    def filter(self, record: logging.LogRecord) -> bool:
        """Log the message's template and the kind of its error, once per interval."""
        error = record.exc_info[1] if record.exc_info else None
        kind = type(error).__name__ if error is not None else ""
        if not self._may_log(f"{record.name} {record.msg} {kind}"):
            return False
        if kind:
            record.msg, record.args = f"{record.msg} ({kind})", None
        else:
            record.args = None
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def configure(config: LogConfig, stream: TextIO | None = None) -> LogStream:
    """Set up logging for the process: its own loggers and, from warnings up, those of libraries. Returns where they write."""
    output = LogStream(sys.stderr if stream is None else stream)
    renderer: structlog.typing.Processor
    if config.format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=output.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _described_error,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        # A call below the level costs one method call that does nothing.
        wrapper_class=structlog.make_filtering_bound_logger(config.level),
        logger_factory=structlog.PrintLoggerFactory(output),  # type: ignore[arg-type]  # it writes and flushes
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    handler.addFilter(_Libraries())
    logging.basicConfig(
        handlers=[handler], level=max(logging.WARNING, getattr(logging, config.level.upper())), force=True
    )
    return output


def _described_error(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace an error by its kind and the places that it passed. Messages of foreign errors may quote a prompt."""
    given = event.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        event["error"] = str(error) if isinstance(error, MatrixInferError) else type(error).__name__
        event["trace"] = _places(error.__traceback__)
        if error.__cause__ is not None:
            event["cause"] = type(error.__cause__).__name__
    return event


def _places(trace: TracebackType | None) -> list[str]:
    """Where an error came through, innermost last: at most the last frames."""
    places: list[str] = []
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rpartition('site-packages/')[2]}:{trace.tb_lineno} {code.co_qualname}")
        trace = trace.tb_next
    return places[-_MAX_FRAMES:]
