"""The pods as configured, listed and drained: what the gateway and the agent have in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from matrixinfer.config import DiscoveryConfig
from matrixinfer.pods.discovery.discovery import Discovery
from matrixinfer.pods.discovery.fleet import Fleet, Watched
from matrixinfer.pods.discovery.membership import Membership
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.telemetry.metrics import Metrics

FIRST_LISTS_SECONDS = 3.0
"""How long the start waits for the first lists of files and name servers."""
FIRST_POD_SECONDS = 5.0
"""How long it then waits for the first pod that answers."""
_POLL_SECONDS = 0.02


class PodSources(NamedTuple):
    """The pods that there are, and what lists them."""

    fleet: Fleet
    discovery: Discovery


class DiscoveryCollector(Collector):
    """What the sources of pods list, and how often they could not be read."""

    def __init__(self, fleet: Fleet | None = None) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Read the states now."""
        pods = GaugeMetricFamily("matrixinfer_discovered_pods", "Pods that a source lists.", labels=["source"])
        failing = GaugeMetricFamily(
            "matrixinfer_discovery_failing",
            "1 while a source cannot be read and its last list counts.",
            labels=["source"],
        )
        failures = CounterMetricFamily(
            "matrixinfer_discovery_failures", "Times that a source could not be read.", labels=["source"]
        )
        if self._fleet is not None:
            for source, state in self._fleet.states.items():
                pods.add_metric([source], len(self._fleet.membership.listed_by(source)))
                failing.add_metric([source], state.error is not None)
                failures.add_metric([source], state.failures)
        yield from (pods, failing, failures)


@asynccontextmanager
async def pod_sources(
    config: DiscoveryConfig,
    watched: Watched,
    registry: PodRegistry,
    metrics: Metrics,
    in_flight: Callable[[Pod], int] = lambda _: 0,
) -> AsyncIterator[PodSources]:
    """Keep the pods at what the sources list while the context is open. Waits a while for the first lists and answers."""
    async with (
        Fleet(Membership(), watched, registry, in_flight) as fleet,
        Discovery(fleet, config.sources) as discovery,
    ):
        metrics.register(DiscoveryCollector(fleet))
        before = len(registry.pods)
        await discovery.first_answers(FIRST_LISTS_SECONDS)
        if len(registry.pods) > before:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_POD_SECONDS):
                    while not registry.any_healthy():  # noqa: ASYNC110 - the registry does no I/O and has no events
                        await asyncio.sleep(_POLL_SECONDS)
        yield PodSources(fleet, discovery)
