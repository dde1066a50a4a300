"""Prompts that the engine gets as token ids: the answers are those to the prompts themselves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from matrixinfer.trust.sent_ids.bodies import CLASSES

from . import workload
from .engine import NAME, Engine
from .results import Results
from .target import CHAT, COMPLETIONS, Json, Target, gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

_MOST = 100
STREAMED: Json = {"stream": True, "stream_options": {"include_usage": True}}


def asked(path: str, text: str) -> Json:
    return {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}


def sent_ids(target: Target) -> bool:
    return next(target.service.state.decisions.newest()).sent_ids


async def direct(target: Target, engine: Engine, path: str, body: Json) -> Json:
    async with target.session.post(engine.url + path, json=body) as response:
        answer: Json = await response.json()
        assert response.status == 200, answer
        return answer


async def test_answers_to_token_ids_are_the_answers_to_the_prompts(engines: Sequence[Engine], results: Results) -> None:
    draw, tally = random.Random(31), results.of("prompts sent as token ids")
    first = engines[:1]
    async with gateway(first, sends_ids=True) as target:
        for path in CLASSES:
            for _ in range(_MOST):
                await target.ask(tally, path, asked(path, workload.text(draw, 150)))
                if sent_ids(target):
                    break
                await asyncio.sleep(1.2)  # until the events of a sampled prompt have surely come
            assert sent_ids(target)
            carried = 0
            texts = [*workload.ODD, *(workload.text(draw, words) for words in (5, 31, 200, 900, 3000))]
            for text in texts:
                body = {"model": NAME, "temperature": 0, "seed": 1, "max_tokens": 12, **asked(path, text)}
                await direct(target, first[0], path, body)  # so that all that are compared find the same in the cache
                for more in ({}, {"n": 2, "temperature": 0.7}, {"stop": ["a"]}, STREAMED):
                    answer = await target.ask(tally, path, body | more)
                    if sent_ids(target):
                        carried += 1
                        expected = await direct(target, first[0], path, body | ({} if more is STREAMED else more))
                        choice = expected["choices"][0]
                        assert answer.text == (choice["text"] if path == COMPLETIONS else choice["message"]["content"])
            assert carried >= len(texts) * 3
        assert await target.metric("matrixinfer_token_ids_probes_total", 'result="honoured"') == len(CLASSES)
    assert tally.exact == tally.compared


async def test_what_the_engine_must_read_goes_as_it_came(engines: Sequence[Engine], results: Results) -> None:
    draw, tally = random.Random(32), results.of("prompts that are not sent as token ids")
    async with gateway(engines[:1], sends_ids=True) as target:
        for _ in range(_MOST):
            await target.ask(tally, CHAT, asked(CHAT, workload.text(draw, 150)))
            if sent_ids(target):
                break
            await asyncio.sleep(1.2)
        assert sent_ids(target)
        for more in ({"tools": workload.TOOLS}, {"logprobs": True}, {"echo": True}, {"reasoning_effort": "low"}):
            await target.ask(tally, CHAT, asked(CHAT, workload.text(draw, 100)) | more)
            assert not sent_ids(target)
        # A malformed request gets the engine's own words.
        body = {"model": NAME, "temperature": -1, **asked(CHAT, workload.text(draw, 100))}
        async with target.session.post(target.service.gateway.url + CHAT, json=body) as response:
            refused, status = await response.json(), response.status
        async with target.session.post(engines[0].url + CHAT, json=body) as response:
            assert (status, refused) == (response.status, await response.json())
        assert status == 400
        await target.ask(tally, CHAT, asked(CHAT, workload.text(draw, 150)))
        assert await target.metric("matrixinfer_token_ids_probes_total", 'result="refused"') == 0
