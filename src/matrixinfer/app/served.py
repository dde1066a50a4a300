"""The engines of each model, as the search for tokenizers needs them."""

from __future__ import annotations

from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.finder import Fleet, Served


def served_models(registry: PodRegistry) -> Fleet:
    """Every pod that has reported its model, by the model's configured name, or else the engine's own."""
    fleet: dict[str, list[Served]] = {}
    for pod in registry.pods:
        if pod.served is not None:
            model = pod.served.base_model
            served = Served(
                engine=pod,
                name=pod.name,
                model=model,
                root=pod.served.root,
                healthy=pod.healthy,
                identity=(pod.url, pod.facts, pod.restarts),
            )
            fleet.setdefault(registry.configured_name(model, [pod]), []).append(served)
    return fleet
