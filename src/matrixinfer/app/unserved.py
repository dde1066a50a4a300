"""Warns of configured models that no engine serves, as when a name is mistyped."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from matrixinfer.config import ModelConfig
from matrixinfer.pods.registry import PodRegistry

log = structlog.get_logger(__name__)
_MOST_NAMES = 20


class UnservedModels:
    """Call it when pods may serve other models than before: it logs what has changed."""

    def __init__(self, registry: PodRegistry, models: Sequence[ModelConfig]) -> None:
        self._registry = registry
        self._models = models
        self._warned: set[str] = set()

    def reconfigure(self, models: Sequence[ModelConfig]) -> None:
        """Look for these from the next time on."""
        self._models = models

    def __call__(self) -> None:
        """Warn once of each configured model that no pod serves now, and say when one is served again."""
        pods = self._registry.pods
        if any(pod.served is None and pod.healthy for pod in pods):
            return  # it answers and does not say what it serves: it may be any of them
        reported = [pod.served for pod in pods if pod.served is not None]
        if not reported:
            return
        served = {name for each in reported for name in (*each.aliases, *each.adapters)}
        for model in self._models:
            is_served = not served.isdisjoint((model.name, *model.aliases))
            if is_served and model.name in self._warned:
                self._warned.discard(model.name)
                log.info("model_served", model=model.name)
            elif not is_served and model.name not in self._warned:
                self._warned.add(model.name)
                log.warning(
                    "model_not_served",
                    model=model.name,
                    served=sorted(served)[:_MOST_NAMES],
                    unanswered=[pod.name for pod in pods if pod.served is None][:_MOST_NAMES],
                )
