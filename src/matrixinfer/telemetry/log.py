"""Structured logging to standard error. Events are short names with fields; no field holds a prompt or token ids."""

from __future__ import annotations

import logging
import sys

import structlog

from matrixinfer.config import LogConfig


def configure(config: LogConfig) -> None:
    """Set up logging for the process: its own loggers and, from warnings up, those of libraries."""
    renderer: structlog.typing.Processor
    if config.format == "json":
        renderer = structlog.processors.JSONRenderer()
        # By default, both formats show local variables, which hold prompts.
        frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        exceptions: list[structlog.typing.Processor] = [structlog.processors.ExceptionRenderer(frames)]
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        exceptions = []
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *exceptions,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        # A call below the level costs one method call that does nothing.
        wrapper_class=structlog.make_filtering_bound_logger(config.level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(
        handlers=[handler], level=max(logging.WARNING, getattr(logging, config.level.upper())), force=True
    )
