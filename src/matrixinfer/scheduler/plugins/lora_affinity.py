"""`lora-affinity`: prefers pods that have the request's adapter in use, or room for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from matrixinfer.config import Section
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services

_LOADED, _ROOM = 100.0, 50.0


class LoraAffinity(Plugin):
    """Scores 100 for pods whose engine has used the request's adapter lately, and 50 for those with room for another one.

    An engine keeps as many adapters on its device as `--max-loras` says, those that were used last. Which they are is
    read from its metrics (`vllm:lora_requests_info`); one that does not say it may have room. Requests for a base model
    score 0 everywhere.
    """

    name: ClassVar[str] = "lora-affinity"

    class Args(Section, frozen=True):
        """It has no arguments."""

    def __init__(self, args: Args, services: Services) -> None:
        pass

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        if request.adapter is None:
            return Scores(values=[0.0] * len(candidates))
        return Scores(values=[_value(request.adapter, each) for each in candidates])


def _value(adapter: str, candidate: Candidate) -> float:
    loaded = candidate.adapters
    if loaded is None:  # vLLM says it from its first request on
        return _ROOM
    if adapter in loaded.names:
        return _LOADED
    return _ROOM if len(loaded.names) < loaded.most else 0.0
