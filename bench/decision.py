"""The decision path: each stage alone, and the whole path through the router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvloop

from bench.fleet import Fleet, candidates, fill, fleet, hold_partly
from bench.measure import Figure, Scale, each, rounds_of
from bench.prompts import MODEL, chat, tokenizer_path
from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.requests import parse
from matrixinfer.scheduler.framework import SchedulingRequest

_TARGET_KIB, _TARGET_US = 64, 2_000.0


def run(scale: Scale) -> Iterator[Figure]:
    """Every stage, by prompt size and number of pods."""
    tokenizer = LocalTokenizer.load(tokenizer_path(), "chatml")
    with tokenizing() as (runner, manager):
        for pods in scale.pods:
            gateway = fleet(pods, manager)
            fill(gateway.index, gateway.pods, scale.index_blocks)
            for kib in scale.prompt_kib:
                case = f"{kib} KiB, {pods} pods"
                bodies = [chat(kib, session) for session in range(scale.sessions)]
                stages = _stages(bodies, tokenizer, gateway)
                calls = [*stages.values(), routing(runner, gateway, bodies)]
                *parts, total = (min(times) / len(bodies) * 1e6 for times in rounds_of(*calls, scale=scale))
                for name, value in zip(stages, parts, strict=True):
                    yield Figure(case=case, name=name, value=value, unit="µs")
                yield Figure(case=case, name="other", value=total - sum(parts), unit="µs")
                yield Figure(
                    case=case, name="total", value=total, unit="µs", target=_TARGET_US if kib == _TARGET_KIB else None
                )


@contextmanager
def tokenizing(
    chat_template: str = "chatml", *, cache_bytes: int = 0
) -> Iterator[tuple[asyncio.Runner, TokenizerManager]]:
    """A running tokenizer manager, and the event loop that it runs on. Without `cache_bytes` every prompt is new."""
    models = (ModelConfig(name=MODEL, tokenizer=str(tokenizer_path()), chat_template=chat_template),)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        manager = TokenizerManager(models, TokenizationConfig(cache_bytes=cache_bytes), None)
        runner.run(manager.__aenter__())
        try:
            yield runner, manager
        finally:
            runner.run(manager.__aexit__())


def routing(runner: asyncio.Runner, gateway: Fleet, bodies: Sequence[bytes]) -> Callable[[], None]:
    """A callable that routes every body. Each request ends before the next starts."""

    async def route() -> None:
        for body in bodies:
            async with gateway.router.dispatch(CHAT_PATH, body, request_id="bench"):
                pass

    loop = runner.get_loop()
    return lambda: loop.run_until_complete(route())


def _stages(bodies: Sequence[bytes], tokenizer: LocalTokenizer, gateway: Fleet) -> dict[str, Callable[[], None]]:
    """Each stage as a callable over all bodies. Also adds the sessions' blocks to the index."""
    prompts = [parse(CHAT_PATH, body) for body in bodies]
    texts = [tokenizer.render(prompt.chat) for prompt in prompts if prompt.chat is not None]
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    chains = [list(gateway.blocks.chain(ids)) for ids in tokens]
    for session, chain in enumerate(chains):
        hold_partly(gateway.index, gateway.pods, chain, session)
    scored = [
        (_request(prompt, len(ids), chain), candidates(gateway.pods, gateway.index.count(MODEL, chain)))
        for prompt, ids, chain in zip(prompts, tokens, chains, strict=True)
    ]
    return {
        "parse": each(lambda body: parse(CHAT_PATH, body), bodies),
        "render": each(tokenizer.render, [prompt.chat for prompt in prompts if prompt.chat is not None]),
        "tokenize": each(lambda text: tokenizer.encode(text, add_special_tokens=False), texts),
        "hash": each(lambda ids: gateway.blocks.chain(ids)[:], tokens),
        "lookup": each(lambda chain: gateway.index.count(MODEL, chain), chains),
        "score": each(lambda pair: gateway.scheduler.schedule(*pair), scored),
    }


def _request(prompt: Prompt, tokens: int, chain: Sequence[int]) -> SchedulingRequest:
    return SchedulingRequest(
        id="bench", model=MODEL, prompt_tokens=tokens, block_size=128, chain=chain, prefix=bytes(prompt.prefix)
    )
