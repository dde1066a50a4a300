"""What of a running gateway can be changed, and how a new configuration takes effect there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matrixinfer.app.access_setup import Access, Policy, check_secrets
from matrixinfer.app.engines import Watching
from matrixinfer.app.fleet_setup import PodSources
from matrixinfer.app.front_setup import Front, stripped
from matrixinfer.config import Config, SchedulerConfig
from matrixinfer.pods.discovery.membership import CONFIG
from matrixinfer.pods.outliers import Outliers
from matrixinfer.routing.router import Router
from matrixinfer.routing.routes import Routes
from matrixinfer.routing.sizing import Sizer
from matrixinfer.scheduler.scheduler import Scheduler


@dataclass(kw_only=True)
class Live:
    """The parts. `build` makes a scheduler, or raises `ConfigError`."""

    config: Config
    scheduler: Scheduler
    build: Callable[[SchedulerConfig], Scheduler]
    router: Router
    routes: Routes
    access: Access
    sizer: Sizer
    front: Front
    outliers: Outliers
    watching: Watching
    pods: PodSources

    async def apply(self, config: Config) -> None:
        """Put a configuration into effect whose changes are all reloadable. Requests in flight are not touched.

        What can fail comes first. If anything fails all the same, what was in effect before is again.
        """
        before, scheduler = self.config, self.scheduler
        check_secrets(config)
        new = scheduler if config.scheduler == before.scheduler else self.build(config.scheduler)
        old, policy = self.access.policy, await self.access.prepare(config)
        try:
            await self._set(config, new, policy)
        except BaseException:
            await self._set(before, scheduler, old)
            raise
        finally:
            for each in (old, policy):
                await self.access.drop(each)

    async def _set(self, config: Config, scheduler: Scheduler, policy: Policy) -> None:
        self.config, self.scheduler = config, scheduler
        self.access.enforce(policy)
        self.routes.reconfigure(config.routes)
        self.front.credentials.reconfigure(stripped(config))
        self.sizer.reads_bytes = scheduler.reads_bytes
        self.router.reconfigure(scheduler, config.scheduler.weights, config.discovery.slow_start_seconds)
        self.front.bodies.reconfigure(config.limits)
        self.front.proxy.reconfigure(config.limits)
        self.front.fan_out.reconfigure(config.limits)
        self.front.retries.reconfigure(config.retries)
        self.outliers.reconfigure(config.outliers)
        self.front.gateway.reconfigure(config.drain)
        self.watching.reconfigure(config.pod_watch, config.models)
        self.front.pods_admin.drain_seconds = config.discovery.drain_seconds
        self.pods.fleet.published(CONFIG, config.pods)
        await self.pods.discovery.replace(config.discovery.sources)
