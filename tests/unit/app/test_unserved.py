from __future__ import annotations

import structlog

from matrixinfer.app.unserved import UnservedModels
from matrixinfer.config import ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.pods.registry import PodRegistry, ServedNames


def test_a_configured_model_that_no_engine_serves_is_warned_of_once() -> None:
    pods = [PodConfig(name=name, url=f"http://{name}") for name in ("a", "b")]
    models = (ModelConfig(name="qwen"), ModelConfig(name="llama", aliases=("l",)))
    registry = PodRegistry(pods, models, PodWatchConfig(), clock=lambda: 0.0)
    watch = UnservedModels(registry, models)
    with structlog.testing.capture_logs() as logs:
        watch()  # nobody has answered yet
        assert logs == []
        registry.learn("a", served=ServedNames(base_model="l", aliases=frozenset({"l", "m"}), adapters={"x": "l"}))
        registry.answered("b")
        watch()  # b answers, but does not say what it serves
        assert logs == []
        for _ in range(2):
            registry.failed("b")
        for _ in range(2):
            watch()
        (entry,) = logs
        assert (entry["event"], entry["log_level"], entry["model"]) == ("model_not_served", "warning", "qwen")
        assert (entry["served"], entry["unanswered"]) == (["l", "m", "x"], ["b"])
        registry.learn("b", served=ServedNames(base_model="qwen", aliases=frozenset({"qwen"}), adapters={}))
        watch()
        assert [each["event"] for each in logs] == ["model_not_served", "model_served"]
        registry.leave("b")
        watch()
        assert [each["event"] for each in logs][2:] == ["model_not_served"]
