"""Prompts with images, whose engine's names and token ids the router learns from events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from matrixinfer.kvevents.wire import decode
from matrixinfer.prompt.base import Prompt, Tokenized, Tokens
from matrixinfer.prompt.outline import Outline, contents_of
from matrixinfer.prompt.remote import Engine
from matrixinfer.routing.in_flight import InFlight
from tests.unit.kvevents.support import frame, stored

from .test_unknown_parts import BLOCK, Partly, World, candidate, chat, image, text

PAD = 900
BEFORE, AFTER, SIZE = list(range(1, 21)), list(range(50, 80)), 40
IDS = [*BEFORE, *[PAD] * SIZE, *AFTER]


class Outlined(Partly):
    async def tokenize(
        self, prompt: Prompt, *, model: str, engines: Sequence[Engine], may_be_late: bool = False
    ) -> Tokenized:
        assert prompt.chat is not None
        contents = contents_of(prompt.chat)
        assert contents is not None
        outline = Outline(ids=np.array([*BEFORE, PAD, *AFTER], dtype=np.uint32), contents=contents)
        ids = np.array(BEFORE, dtype=np.uint32)
        return Tokenized(tokens=Tokens(ids=ids, complete=False, outline=outline), source="local")


def events(world: World, pod: str, name: str, first: int, salt: str | None = None) -> None:
    """The pod's engine stores the blocks of the prompt with the image of that name."""
    keys: list[Any] = [
        [[name, 20 - start]] if start < 60 and start + BLOCK > 20 else [] for start in range(0, 80, BLOCK)
    ]
    keys[0] += [salt] if salt else []
    event = stored(range(first, first + 5), IDS[:80], extra_keys=[key or None for key in keys], block_size=BLOCK)
    world.feeds[pod].ledger.apply(*decode(frame(event)).events)


async def answered(world: World, request: InFlight, cached: int) -> None:
    request.first_byte()
    request.usage(len(IDS), cached)
    await world.requests.finish(request)
    world.now += 5.0


def body(data: str, **more: Any) -> dict[str, Any]:
    return {**chat([text("look"), image(data), text("what?")]), **more}


async def test_the_second_time_an_image_comes_its_hit_is_predicted_to_the_token() -> None:
    world = World(Outlined(0))
    first = await world.sent(body("AAAA"))
    pod = first.pod.name
    events(world, pod, "hash-a", 100)
    await answered(world, first, 0)
    second = await world.sent(body("AAAA"))
    assert second.pod.name == pod
    request = second.decision.request
    assert (request.prompt_tokens, request.unknown_tokens) == (len(IDS), 0)
    assert candidate(world, second, pod).matched_blocks == 5
    await answered(world, second, 80)
    other = await world.sent(body("BBBB"))
    assert candidate(world, other, pod).matched_blocks == 1  # what stands before the image
    assert other.decision.request.unknown_tokens > 0
    await answered(world, other, 16)


async def test_a_salt_keeps_what_is_held_apart_but_not_what_is_learnt() -> None:
    world = World(Outlined(0))
    first = await world.sent(body("AAAA", cache_salt="s"))
    pod = first.pod.name
    events(world, pod, "hash-a", 100, salt="s")
    await answered(world, first, 0)
    plain = await world.sent(body("AAAA"))
    assert plain.decision.request.prompt_tokens == len(IDS)
    assert candidate(world, plain, pod).matched_blocks == 0
    await answered(world, plain, 0)
    salted = await world.sent(body("AAAA", cache_salt="s"))
    assert candidate(world, salted, pod).matched_blocks == 5
    await answered(world, salted, 80)


async def test_requests_that_set_options_for_the_processor_are_not_learnt_from() -> None:
    world = World(Outlined(0))
    first = await world.sent(body("AAAA", mm_processor_kwargs={"max_pixels": 1}))
    events(world, first.pod.name, "hash-a", 100)
    await answered(world, first, 0)
    assert len(world.parts.media) == 0
    second = await world.sent(body("AAAA"))
    assert second.decision.request.prompt_tokens == len(BEFORE)
    await answered(world, second, 0)
