"""Connects the dashboard with the parts that it shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

import matrixinfer
from matrixinfer.app.engines import Engines
from matrixinfer.config import Config
from matrixinfer.dashboard.examination import Examination
from matrixinfer.dashboard.fleet import Fleet
from matrixinfer.dashboard.history import History
from matrixinfer.dashboard.live import About, Live
from matrixinfer.dashboard.pages import Dashboard
from matrixinfer.pods.outliers import Outliers
from matrixinfer.routing.decision_log import DecisionLog
from matrixinfer.traffic.load import LoadLedger


def dashboard(
    config: Config,
    engines: Engines,
    *,
    history: History,
    outliers: Outliers,
    load: LoadLedger,
    decisions: DecisionLog,
    slow_start_seconds: Callable[[], float],
    draining: asyncio.Event,
    api: Callable[[], str],
) -> Dashboard:
    """The dashboard of a gateway. `api` gives the base URL of its API once it listens."""
    caches, registry = engines.setup.caches, engines.registry
    fleet = Fleet(registry, caches, outliers, load, history, engines.drift.reuse, slow_start_seconds)

    def about() -> About:
        return About(version=matrixinfer.__version__, api=api(), decisions_kept=config.scheduler.decisions_kept)

    def present() -> Config:
        """The configuration with the pods that are there now."""
        return msgspec.structs.replace(config, pods=tuple(pod.config for pod in registry.pods))

    live = Live(fleet, history, decisions, about, registry.clock, time.time)
    return Dashboard(live, Examination(present), draining)
