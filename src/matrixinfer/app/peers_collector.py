"""Metrics of the channel between gateways, read at every scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.traffic.peers.link import Peers


class PeersCollector(Collector):
    """Other gateways, and the messages exchanged with them."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def collect(self) -> Iterator[Metric]:
        """Read the channel now."""
        peers = self._peers
        yield GaugeMetricFamily("matrixinfer_peers", "Other gateways heard from lately.", value=peers.count())
        messages = CounterMetricFamily(
            "matrixinfer_peer_messages",
            "Messages between gateways. Dropped: prompts too long to send whole, and messages of too many gateways.",
            labels=["kind"],
        )
        counts = {"sent": peers.stats.sent, "received": peers.stats.received, "malformed": peers.stats.malformed}
        for kind, count in (counts | {"dropped": peers.dropped}).items():
            messages.add_metric([kind], count)
        yield messages
