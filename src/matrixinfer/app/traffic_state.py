"""What a gateway remembers about its traffic."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matrixinfer.config import Config
from matrixinfer.dashboard.history import History
from matrixinfer.pods.outliers import Outliers
from matrixinfer.pods.pod import Pod
from matrixinfer.routing.decision_log import DecisionLog
from matrixinfer.routing.stored_responses import StoredResponses
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.telemetry.outlier_log import OutlierLog
from matrixinfer.traffic.history import RoutingHistory
from matrixinfer.traffic.ladder.record import LadderLog
from matrixinfer.traffic.load import LoadLedger
from matrixinfer.traffic.peers.loads import PeerLoads
from matrixinfer.trust.parity import Parity


@dataclass(frozen=True, kw_only=True)
class TrafficState:
    """The ledgers and logs that requests are written to; each of them is bounded."""

    load: LoadLedger
    peer_loads: PeerLoads
    history: RoutingHistory
    outliers: Outliers
    parity: Parity
    decisions: DecisionLog
    stored: StoredResponses
    ladder: LadderLog
    dashboard: History

    def in_flight(self, pod: Pod) -> int:
        """Requests that the endpoints of a pod have."""
        return sum(self.load.in_flight(endpoint.name) for endpoint in pod.endpoints)

    def sizes(self) -> Mapping[str, Callable[[], int]]:
        """How many entries each has, under the names of `matrixinfer_kept_entries`."""
        return {
            "decisions": self.decisions.__len__,
            "dashboard_prefixes": self.dashboard.__len__,
            "recent_blocks": self.history.__len__,
            "recent_chunks": lambda: self.history.chunks,
            "pending_blocks": self.load.__len__,
            "outlier_endpoints": self.outliers.__len__,
            "ladder_blocks": self.ladder.__len__,
            "parity_samples": self.parity.sampling.__len__,
            "stored_responses": self.stored.__len__,
        }


def traffic_state(config: Config, metrics: Metrics, clock: Callable[[], float]) -> TrafficState:
    """The state of a gateway that has seen no request yet."""
    load = LoadLedger(clock, config.scheduler.pending_seconds)
    history = RoutingHistory(keeps_exact=config.index.kind == "redis")
    history.watch_gone(load)
    return TrafficState(
        load=load,
        peer_loads=PeerLoads(uuid.uuid4().hex),
        history=history,
        outliers=Outliers(
            config.outliers,
            clock,
            OutlierLog(metrics),
            can_check=config.retries.after_send > 0 and config.limits.max_attempts > 1,
        ),
        parity=Parity(metrics, clock, proves_endpoints=config.tokenization.send_ids != "never"),
        decisions=DecisionLog(config.scheduler.decisions_kept),
        stored=StoredResponses(),
        ladder=LadderLog(clock, tracks=config.blocks.scheme == "prefix"),
        dashboard=History(clock),
    )
