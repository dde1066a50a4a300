"""Small fleets and traces."""

from __future__ import annotations

from matrixinfer.sim.model import Timing
from matrixinfer.study.engine import EngineShape
from matrixinfer.study.fleet import Fleet
from matrixinfer.study.gateway import Gateway
from matrixinfer.study.generators import generate
from matrixinfer.study.policies import POLICIES
from matrixinfer.study.replay import Replay
from matrixinfer.study.trace import Trace

TIMING = Timing(
    step=0.005, prefill_token=0.00005, decode_sequence=0.0001, attention_pair=1e-9, decode_context=2e-8, load_block=0.0
)


def fleet(trace: Trace, **settings: object) -> Fleet:
    shape = EngineShape(block_size=trace.block_size, timing=TIMING, max_tokens=2048, max_sequences=64)
    return Fleet(**{"shape": shape, "pods": 3, "pod_tokens": 20_000, **settings})  # type: ignore[arg-type]


def chats(seed: int = 0, **settings: float) -> Trace:
    given = {"sessions": 24, "turns": 5, "interval": 0.5, "think": 2} | settings
    return generate("multi-round:" + ",".join(f"{key}={value}" for key, value in given.items()), seed=seed)


class Watched:
    """A replay, and the gateways that it made."""

    def __init__(self, trace: Trace, fleet: Fleet, policy: str = "kv_aware") -> None:
        self.gateways: list[Gateway] = []
        chosen = POLICIES[policy]

        def make(replay: Replay, number: int) -> Gateway:
            gateway = chosen.make(replay, number)
            assert isinstance(gateway, Gateway)
            self.gateways.append(gateway)
            return gateway

        self.replay = Replay(trace, fleet, make, publishes=True)
        self.replay.run()

    def settle(self, gateway: Gateway) -> None:
        """Let all frames arrive, and ask for those that were lost."""
        for pod in self.replay.pods.values():
            publisher = pod.publisher
            assert publisher is not None
            gateway.receive(float("inf"))
            gateway.replayed(pod.name, 0, publisher.since(0))
            gateway.heartbeat(pod.name)
            gateway.replayed(pod.name, 0, publisher.since(0))
            gateway.replayed(pod.name, 0, publisher.since(0))
