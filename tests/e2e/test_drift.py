"""The index credits a pod with blocks that it lacks: its answers show that, and the pod is indexed again."""

from __future__ import annotations

from typing import Any

from matrixinfer.config import DriftConfig
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.model import Timing
from matrixinfer.trust.drift import RUN
from tests.waiting import eventually

from .fleet import Fleet, fleet

COMPLETIONS = "/v1/completions"
ENGINE = SimEngineConfig(
    model="m", block_size=128, num_blocks=5_000, timing=Timing(step=0.0005, prefill_token=0, decode_sequence=0)
)


def body(number: int) -> dict[str, Any]:
    return {"model": "m", "prompt": [number] * 300, "max_tokens": 1}


async def predicted(gateway: Fleet, number: int) -> int:
    decision = await gateway.explain(COMPLETIONS, body(number))
    hit: int = decision["pods"]["pod-0"]["predicted_hit_tokens"]
    return hit


def claim(gateway: Fleet, *numbers: int) -> None:
    """Have the index hold prompts that the engine has never seen."""
    engines = gateway.service.engines
    for number in numbers:
        chain = engines.blocks.chain([number] * 300)
        engines.subscriber.feeds["pod-0"].ledger.supports.add("m", list(chain), None)


async def test_a_pod_whose_answers_report_fewer_hits_is_indexed_again(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=1) as gateway:
        for _ in range(2):  # the second answer has cached tokens, so that the pod is known to report them
            await gateway.post(COMPLETIONS, body(1))
            await gateway.settled()
        claim(gateway, *range(2, 12))
        assert await predicted(gateway, 9) == 256
        for number in range(2, 2 + RUN):
            await gateway.post(COMPLETIONS, body(number))
        feed = gateway.service.engines.subscriber.feeds["pod-0"]
        counted = gateway.service.metrics.registry.get_sample_value
        await eventually(lambda: counted("matrixinfer_kv_resyncs_total", {"pod": "pod-0"}) == 1)
        await eventually(lambda: feed.state.value == "complete" and len(feed.ledger) > 2)
        assert await predicted(gateway, 9) == 0
        assert await predicted(gateway, 1) == 256
        async with gateway.session.get(f"{gateway.url}/metrics") as response:
            assert 'matrixinfer_kv_resyncs_total{pod="pod-0"} 1.0' in await response.text()
        answer, _ = await gateway.post(COMPLETIONS, body(1))
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 256}


async def test_usage_is_asked_for_in_streams_and_kept_from_clients_who_did_not_ask(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, ENGINE, pods=1, drift=DriftConfig(inject_usage=True)) as gateway:
        for number, options in (
            (0, {}),
            (1, {"stream_options": {"include_usage": True}}),
            (2, {"stream_options": None}),
        ):
            for _ in range(2):
                await gateway.settled()
                sent = body(number) | {"stream": True, "max_tokens": 3} | options
                async with gateway.session.post(gateway.url + COMPLETIONS, json=sent) as response:
                    text = await response.text()
                assert text.endswith("data: [DONE]\n\n")
                assert text.count('"finish_reason":"length"') == 1
                assert ('"usage":{' in text) == (number == 1)
        assert await gateway.metric('matrixinfer_drift_total{pod="pod-0",result="exact"}') == 6
