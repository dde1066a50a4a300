"""How the configuration is read again while the gateway runs, and which keys may change then."""

from __future__ import annotations

import re
from typing import Annotated, Final

from matrixinfer.config.base import Seconds, Section, described

RELOADABLE: Final = (
    "pods",
    "discovery",
    "limits",
    "drain",
    "retries",
    "outliers",
    "podWatch",
    "reload",
    "routes",
    "access.keysFile",
    "access.jwt",
    "access.limits",
    "access.tenants",
    "access.isolation",
    "access.stripHeaders",
    "admission.maxConcurrentRequests",
    "admission.queueSize",
    "admission.queueTimeoutSeconds",
    "scheduler.plugins",
    "scheduler.pluginConfig",
    "scheduler.weights",
    "scheduler.slowPluginSeconds",
)
"""Keys that may change while the gateway runs, with all below them. So may the aliases of models; all others need a restart."""
_ALIASES = re.compile(r"models\[.*\]\.aliases")


class ReloadConfig(Section, frozen=True):
    """When the config file is read again. SIGHUP and `POST /admin/reload` do it in any case."""

    watch: Annotated[bool, described("Whether to read the file again when its content changes.")] = True
    interval_seconds: Annotated[Seconds, described("Time between two looks at the file.")] = 2.0


def needs_restart(key: str) -> bool:
    """Whether a change of this key takes effect only after a restart."""
    if _ALIASES.fullmatch(key):
        return False
    return not any(key == each or key.startswith((f"{each}.", f"{each}[")) for each in RELOADABLE)
