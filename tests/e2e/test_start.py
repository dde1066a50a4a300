"""What the gateway says and does at its start while engines are missing."""

from __future__ import annotations

import time

import structlog

from matrixinfer.app.service import Service
from matrixinfer.config import Config, ModelConfig, PodConfig, checked
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine
from tests.ports import free_port


async def test_a_dead_pod_does_not_delay_the_start_and_an_unserved_model_is_named(tokenizer: LocalTokenizer) -> None:
    async with SimEngine(SimEngineConfig(model="qwen"), tokenizer) as engine:
        pods = (PodConfig(name="a", url=engine.url), PodConfig(name="b", url=f"http://127.0.0.1:{free_port()}"))
        config = Config(
            listen="127.0.0.1:0",
            admin="127.0.0.1:0",
            pods=pods,
            models=(ModelConfig(name="qwem"), ModelConfig(name="qwen")),
        )
        began = time.monotonic()
        with structlog.testing.capture_logs() as logs:
            async with Service(checked(config)):
                assert time.monotonic() - began < 4  # of the 5 s that a pod may take
    said = {entry["event"]: entry for entry in logs}
    assert said["pods_not_answered"]["pods"] == ["b"]
    (unserved,) = [entry for entry in logs if entry["event"] == "model_not_served"]
    assert (unserved["log_level"], unserved["model"]) == ("warning", "qwem")
    assert (unserved["served"], unserved["unanswered"]) == (["qwen"], ["b"])
