"""Says in the log and in metrics that this process, or its machine, has run out of what connections take."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from matrixinfer.telemetry.intervals import Intervals
from matrixinfer.telemetry.metrics import Metrics

_NOTED_SECONDS = 10.0

log = structlog.get_logger(__name__)


class Shortages:
    """Call it with what a connection was for, and with what there was none of, as `errors.shortage_in` says."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._noted = Intervals(_NOTED_SECONDS, clock)

    def __call__(self, place: str, what: str) -> None:
        """Count a connection that was not made, and log it once in a while."""
        self._metrics.shortage(place)
        if self._noted(place):
            log.warning("resources_ran_out", place=place, reason=what)
