from __future__ import annotations

import random

from matrixinfer.scheduler.framework import Adapters, Candidate, SchedulingRequest, Services
from matrixinfer.scheduler.plugins.lora_affinity import LoraAffinity


def scores(adapter: str | None, *loaded: Adapters | None) -> list[float]:
    request = SchedulingRequest(
        id="r", model="m", prompt_tokens=None, block_size=16, chain=(), prefix=b"", adapter=adapter
    )
    plugin = LoraAffinity(LoraAffinity.Args(), Services(clock=lambda: 0.0, rng=random.Random(0)))
    pods = [Candidate(name=f"p{i}", url="", adapters=each) for i, each in enumerate(loaded)]
    return list(plugin.score(request, pods).values)


def having(*names: str, most: int = 2) -> Adapters:
    return Adapters(names=frozenset(names), most=most)


def test_the_pod_that_has_the_adapter_comes_before_one_with_room_and_one_that_must_drop_another() -> None:
    assert scores("a", having("a", "b"), having("b"), having("b", "c"), None) == [100.0, 50.0, 0.0, 50.0]


def test_a_base_model_has_no_preference() -> None:
    assert scores(None, having("a"), having()) == [0.0, 0.0]
