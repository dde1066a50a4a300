"""What of a running gateway can be changed, and how a new configuration takes effect there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matrixinfer.app.access_setup import check_secrets
from matrixinfer.app.engines import Watching
from matrixinfer.app.fleet_setup import PodSources
from matrixinfer.config import Config, SchedulerConfig
from matrixinfer.gateway.body import Bodies
from matrixinfer.gateway.pods_admin import PodsAdmin
from matrixinfer.gateway.proxy import Proxy
from matrixinfer.gateway.retries import Retries
from matrixinfer.gateway.server import Gateway
from matrixinfer.pods.discovery.membership import CONFIG
from matrixinfer.pods.outliers import Outliers
from matrixinfer.routing.router import Router
from matrixinfer.routing.sizing import Sizer
from matrixinfer.scheduler.scheduler import Scheduler


@dataclass(kw_only=True)
class Live:
    """The parts. `build` makes a scheduler, or raises `ConfigError`."""

    config: Config
    scheduler: Scheduler
    build: Callable[[SchedulerConfig], Scheduler]
    router: Router
    sizer: Sizer
    bodies: Bodies
    proxy: Proxy
    retries: Retries
    gateway: Gateway
    outliers: Outliers
    watching: Watching
    pods: PodSources
    pods_admin: PodsAdmin

    async def apply(self, config: Config) -> None:
        """Put a configuration into effect whose changes are all reloadable. Requests in flight are not touched.

        What can fail comes first. If anything fails all the same, what was in effect before is again.
        """
        before, scheduler = self.config, self.scheduler
        check_secrets(config)
        new = scheduler if config.scheduler == before.scheduler else self.build(config.scheduler)
        try:
            await self._set(config, new)
        except BaseException:
            await self._set(before, scheduler)
            raise

    async def _set(self, config: Config, scheduler: Scheduler) -> None:
        self.config, self.scheduler = config, scheduler
        self.sizer.reads_bytes = scheduler.reads_bytes
        self.router.reconfigure(scheduler, config.scheduler.weights, config.discovery.slow_start_seconds)
        self.bodies.reconfigure(config.limits)
        self.proxy.reconfigure(config.limits)
        self.retries.reconfigure(config.retries)
        self.outliers.reconfigure(config.outliers)
        self.gateway.reconfigure(config.drain)
        self.watching.reconfigure(config.pod_watch)
        self.pods_admin.drain_seconds = config.discovery.drain_seconds
        self.pods.fleet.published(CONFIG, config.pods)
        await self.pods.discovery.replace(config.discovery.sources)
