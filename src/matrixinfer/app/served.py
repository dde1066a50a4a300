"""The engines of each model, as the search for tokenizers needs them."""

from __future__ import annotations

from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.prompt.fleet import Fleet, Served


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
                roots=_roots(pod),
                healthy=pod.healthy,
                identity=(pod.url, pod.facts, pod.restarts),
            )
            fleet.setdefault(registry.configured_name(model, [pod]), []).append(served)
    return fleet


def _roots(pod: Pod) -> tuple[str, ...]:
    """Where a pod loaded its model from. SGLang's `root` is only the name that it serves."""
    if pod.engine == "sglang":
        return () if pod.facts is None else pod.facts.roots
    root = None if pod.served is None else pod.served.root
    return () if root is None else (root,)
