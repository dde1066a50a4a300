"""Which adapters an engine has on its device, from the states that its metrics show."""

from __future__ import annotations

import pytest

from matrixinfer.pods.metrics_text import parse_metrics


def states(*states: tuple[str, str, float], most: int = 2) -> bytes:
    lines = ["# TYPE vllm:lora_requests_info gauge"]
    lines += [
        f'vllm:lora_requests_info{{max_lora="{most}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"}} {at}'
        for running, waiting, at in states
    ]
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize(
    ("text", "adapters", "most"),
    [
        (b"", None, 0),
        (states(("", "", 1.0)), (), 2),
        (states(("a", "", 1.0), ("", "", 2.0)), ("a",), 2),
        (states(("a", "", 1.0), ("b", "c", 3.0), ("d", "", 2.0)), ("b", "c"), 2),
        (states(("a", "", 1.0), ("b", "", 3.0), ("c", "", 2.0)), ("b", "c"), 2),
        (states(("a,b", "", 1.76e9), ("b", "", 1.77e9), most=3), ("b", "a"), 3),
    ],
)
def test_those_that_were_used_last_are_there(text: bytes, adapters: tuple[str, ...] | None, most: int) -> None:
    metrics = parse_metrics(text, read_at=0.0)
    assert (metrics.adapters, metrics.most_adapters) == (adapters, most)
