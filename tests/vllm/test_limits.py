"""Cases that no index can predict exactly: how far predictions are off, and that they are exact afterwards."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from . import workload
from .engine import NAME, Engine
from .results import Results
from .target import COMPLETIONS, Target, gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

CLIENTS = 8


async def test_several_answers_to_one_prompt(engines: Sequence[Engine], results: Results) -> None:
    """The second answer finds the blocks of the first, but the engine reports only one of them."""
    draw, during, after = random.Random(31), results.of("n = 2 to 4"), results.of("after n = 2 to 4")
    async with gateway(engines) as target:
        for _ in range(10):
            prompt = workload.ids(draw, draw.randrange(40, 700))
            for n in (2, 3, 4):
                body = {"prompt": [*prompt, *workload.ids(draw, 60)], "n": n, "temperature": 1}
                await target.ask(during, COMPLETIONS, body)
                await target.ask(after, COMPLETIONS, body | {"n": 1})
    assert during.over == 0
    assert after.exact == after.compared


async def test_requests_at_the_same_time(engines: Sequence[Engine], results: Results) -> None:
    """Blocks come and go between a decision and the engine's lookup. No pod is cleared because of that."""
    draw = random.Random(32)
    during, after = results.of(f"{CLIENTS} clients at the same time"), results.of("one client after them")
    async with gateway(engines) as target:
        prefixes = [workload.ids(draw, draw.randrange(300, 1200)) for _ in range(16)]

        async def client(own: random.Random) -> None:
            for _ in range(20):
                prefix = own.choice(prefixes)
                prompt = [*prefix[: own.randrange(len(prefix) // 2, len(prefix))], *workload.ids(own, 50)]
                outcome = await _ask(target, prompt, own.randrange(1, 40))
                during.add(*outcome)

        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client(random.Random(draw.random())))
        assert await target.metric("matrixinfer_kv_resyncs_total") == 0
        answers = await workload.evictions(target, after, draw, count=30)
        assert any(answer.cached for answer in answers)
    assert during.compared == 20 * CLIENTS
    assert after.exact == after.compared


async def _ask(target: Target, prompt: list[int], max_tokens: int) -> tuple[int, int]:
    """Send a request. Returns the predicted hit at the time of the decision, and the reported hit."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens}
    async with target.session.post(target.service.gateway.url + COMPLETIONS, json=body) as response:
        assert response.status == 200
        await response.read()
        return target.recorded(response.headers["x-request-id"])
