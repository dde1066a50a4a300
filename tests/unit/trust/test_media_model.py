"""What is learnt of media from an engine model that serves many requests at a time, some of which no gateway has seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.prompt.outline import Outline
from matrixinfer.sim.attention import Group, Layout
from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.media import MediumRun
from matrixinfer.sim.model import EngineModel, EngineRequest, Timing
from matrixinfer.trust.media import MediaNames, Watched
from tests.unit.kvevents.support import MODEL, POD, Follower

SIZE, PAD = 4, 900
LENGTHS = {"cat": 9, "cow": 9, "dog": 9, "owl": 14}
LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {},
    "windows": {"attention": ["full", "sliding:9"]},
    "states": {"attention": ["full", "mamba"]},
    "drop": {"drop": True},
    "lookahead": {"lookahead": 2},
    "sizes": {"attention": ["full@4", "sliding:9@8"]},
}


class Ask(NamedTuple):
    """A prompt: text, media and text in turn."""

    texts: tuple[tuple[int, ...], ...]
    images: tuple[str, ...]

    @property
    def outline(self) -> Outline:
        ids = [PAD, *self.texts[-1]]
        for text in self.texts[-2:0:-1]:
            ids = [PAD, *text, *ids]
        contents = tuple(image.encode().ljust(32) for image in self.images)
        return Outline(ids=np.array([*self.texts[0], *ids], dtype=np.uint32), contents=contents)

    @property
    def prompt(self) -> tuple[list[int], list[MediumRun]]:
        ids, media = list(self.texts[0]), []
        for image, text in zip(self.images, self.texts[1:], strict=True):
            media.append(MediumRun(len(ids), LENGTHS[image], f"hash-{image}"))
            ids += [*[PAD] * LENGTHS[image], *text]
        return ids, media


class World:
    """An engine, a ledger of its events, and requests of which a gateway has sent some."""

    def __init__(self, blocks: int, attention: Sequence[str] = ("full",), **more: Any) -> None:
        layout = Layout(groups=tuple(Group.parse(text, SIZE) for text in attention), **more)
        cache = PagedPrefixCache(blocks * len(attention), SIZE, layout=layout)
        self.model = EngineModel(cache, Timing(), max_tokens=16, max_sequences=4)
        self.follower = Follower(TokenBlockProcessor(8))
        self.now = 0.0
        self.names = MediaNames(lambda: self.now)
        self.open: dict[int, tuple[Watched | None, int]] = {}
        self.sent = 0

    def send(self, ask: Ask, reply: Sequence[int], *, seen: bool) -> None:
        ids, media = ask.prompt
        watched = None
        if seen:
            watched = self.names.watch(POD, self.follower.ledger, MODEL, None, ask.outline, lambda: True)
        self.sent += 1
        self.open[self.sent] = watched, len(ids)
        request = EngineRequest(id=self.sent, prompt=np.array(ids, dtype=np.uint32), reply=reply, media=media)
        self.model.submit(request)

    def step(self) -> None:
        result = self.model.step()
        if result.events:
            self.follower.apply(*result.events)
        for output in result.outputs:
            if output.finished:
                watched, count = self.open.pop(output.request_id)
                if watched is not None:
                    watched.reported(count, output.cached_tokens)
                    self.names.close(watched)

    def settle(self) -> None:
        while self.model.busy:
            self.step()
        self.now += 10

    def wrong(self, asks: Sequence[Ask]) -> list[Ask]:
        """Prompts that are not expanded as the engine does."""
        wrong = []
        for ask in asks:
            ids, media = ask.prompt
            found = self.names.expand(MODEL, ask.outline)
            expected = [(each.start, each.name) for each in media]
            if found is not None and (found[0].tolist(), found[1]) != (ids, expected):
                wrong.append(ask)
        return wrong

    def known(self, ask: Ask) -> bool:
        return self.names.expand(MODEL, ask.outline) is not None


def texts(draw: random.Random) -> tuple[int, ...]:
    """One of few, so that prompts often differ in their images alone."""
    length = draw.choice([0, 1, 3, 8, 12, 30])
    return tuple(range(100 * (1 + length % 3), 100 * (1 + length % 3) + length))


def asked(draw: random.Random) -> Ask:
    count = draw.choice([1, 1, 2])
    return Ask(tuple(texts(draw) for _ in range(count + 1)), tuple(draw.choice(list(LENGTHS)) for _ in range(count)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_a_name_is_never_that_of_another_image(layout: str, seed: int) -> None:
    draw = random.Random(seed)
    learnt = 0
    for _ in range(12):
        world = World(draw.choice([40, 400]), **LAYOUTS[layout])
        asks: list[Ask] = []
        for _ in range(draw.choice([3, 30])):
            ask = draw.choice(asks) if asks and draw.random() < 0.4 else asked(draw)
            if draw.random() < 0.5:
                ask = ask._replace(images=tuple(draw.choice(list(LENGTHS)) for _ in ask.images))
            asks.append(ask)
            reply = [draw.choice([7, 8]) for _ in range(draw.choice([1, 2, 9]))]
            world.send(ask, reply, seen=draw.random() < 0.6)
            for _ in range(draw.choice([0, 0, 1, 40])):
                if world.model.busy:
                    world.step()
            world.now += draw.choice([0, 0, 3])
            assert world.wrong(asks) == []
        world.settle()
        assert world.wrong(asks) == []
        learnt += sum(map(world.known, asks))
    assert learnt > 5
