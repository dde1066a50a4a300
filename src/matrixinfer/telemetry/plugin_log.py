"""Logs what goes wrong in scheduler plugins, for their authors, without any text of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import structlog

MAX_KINDS = 256
"""Most kinds of failures that are logged."""
SLOW_LOG_SECONDS = 60.0
"""Time between two log lines about the same slow plugin and stage."""
_MAX_FRAMES = 30
_MAX_CAUSES = 4

T = TypeVar("T")

log = structlog.get_logger(__name__)


class PluginLog:
    """The watch of a gateway's scheduler (`matrixinfer.scheduler.framework.PluginWatch`).

    A failure is logged once per kind, which is plugin, type of error and place. Slow calls are logged once a minute per
    plugin and stage. Messages and local variables of foreign code are never logged, as they may quote a prompt.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kinds: set[tuple[str, str, str]] = set()
        self._slow: dict[tuple[str, str], tuple[float, int]] = {}  # time of the last line, calls since then

    def failed(self, plugin: str, stage: str, error: BaseException, reason: str) -> None:
        """Log the first failure of its kind, with its traceback."""
        kind = (plugin, *_readable(lambda: (_type_name(error), _place(error)), ("", "")))
        if kind in self._kinds or len(self._kinds) >= MAX_KINDS:
            return
        self._kinds.add(kind)
        no_lines: list[str] = []
        lines = _readable(lambda: traceback_lines(error), no_lines)
        log.error("plugin_failed", plugin=plugin, stage=stage, reason=reason, traceback=lines)
        if len(self._kinds) == MAX_KINDS:
            log.warning("plugin_log_filled", kinds=MAX_KINDS, counted_in="matrixinfer_plugin_rejected_total")

    def slow(self, plugin: str, stage: str, seconds: float) -> None:
        """Log a slow call, unless one of the same plugin and stage was logged less than a minute ago."""
        now = self._clock()
        logged_at, calls = self._slow.get((plugin, stage), (-math.inf, 0))
        calls += 1
        if now - logged_at >= SLOW_LOG_SECONDS:
            milliseconds = round(seconds * 1e3, 1)
            log.warning("plugin_ran_slow", plugin=plugin, stage=stage, milliseconds=milliseconds, calls=calls)
            logged_at, calls = now, 0
        self._slow[plugin, stage] = (logged_at, calls)

    def skipped(self, broken: Mapping[str, str]) -> None:
        """Log each installed plugin that cannot be used, with the reason."""
        for plugin, reason in broken.items():
            log.warning("plugin_skipped", plugin=plugin, reason=reason)


def _readable(read: Callable[[], T], otherwise: T) -> T:
    try:
        return read()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # Supervision boundary: even an attribute of a foreign error may raise.
        return otherwise


def traceback_lines(error: BaseException) -> list[str]:
    """`file:line:function` of each frame, outermost first, then the error's type; then the same for its causes."""
    lines: list[str] = []
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None:
            break
        frames = list(_frames(cause))
        if len(frames) > _MAX_FRAMES:
            frames = [*frames[: _MAX_FRAMES // 2], "…", *frames[-_MAX_FRAMES // 2 :]]
        lines += [*(["caused by"] if lines else []), *frames, _type_name(cause)]
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return lines


def _frames(error: BaseException) -> Iterator[str]:
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        yield f"{code.co_filename}:{trace.tb_lineno}:{code.co_qualname}"
        trace = trace.tb_next


def _place(error: BaseException) -> str:
    return next(reversed(list(_frames(error))), "")


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
