"""Says in the log and in metrics which endpoints are ejected."""

from __future__ import annotations

import structlog

from matrixinfer.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)


class OutlierLog:
    """The gateway's watch over `pods.outliers`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def ejected(self, name: str, reason: str, seconds: float) -> None:
        """The endpoint gets no requests for `seconds`."""
        log.warning("endpoint_ejected", endpoint=name, reason=reason, seconds=seconds)
        self._metrics.ejected(name)

    def readmitted(self, name: str) -> None:
        """The endpoint has answered its probe."""
        log.info("endpoint_readmitted", endpoint=name)
        self._metrics.readmitted(name)
