"""Chats with images before engines that publish what they make of them: hits are predicted past the images."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from tests.virtual_time import VirtualTimeLoop
from tests.waiting import eventually

from .fleet import TOKENIZER, Fleet, virtual_fleet
from .test_serve import engine, gateway

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
PLACEHOLDER = "<｜place▁holder▁no▁0｜>"
TEMPLATE = (
    "{%- for message in messages %}<|{{ message.role }}|>"
    "{%- if message.content is string %}{{ message.content }}{% else %}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'text' %}{{ part.text }}{% else %}<img>" + PLACEHOLDER + "</img>{% endif %}"
    "{%- endfor %}{% endif %}\n{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
SETTLED_SECONDS = 3.0
WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "theta", "kappa"]
SIZE = 6000
"""Characters of an image, which the engine makes 391 tokens."""


def image(name: str, *, size: int = SIZE) -> Json:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{name.ljust(size, 'A')}"}}


def named(uuid: str, *, size: int = SIZE) -> Json:
    return {**image("", size=size), "uuid": uuid}


def words(seed: str, count: int) -> Json:
    return {"type": "text", "text": " ".join(random.Random(seed).choices(WORDS, k=count))}


def chat(*parts: Json, **more: Any) -> Json:
    return {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": list(parts)}], **more}


def config(block_size: int, **more: Any) -> SimEngineConfig:
    return SimEngineConfig(
        model="m", block_size=block_size, num_blocks=400_000 // block_size, media_token=PLACEHOLDER, **more
    )


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture
def tokenizer(template: Path) -> LocalTokenizer:
    return LocalTokenizer.load(TOKENIZER, str(template))


async def learn(target: Fleet, *bodies: Json) -> None:
    """Send requests one after the other, and wait until what they show is learnt."""
    for body in bodies:
        await target.post(CHAT, body)
    await target.settled()
    await asyncio.sleep(SETTLED_SECONDS)


def is_close(predicted: int, cached: int, block_size: int) -> bool:
    """A prediction is exact, but in whole token blocks of 128."""
    return predicted == cached or (block_size < 128 and cached - 128 < predicted < cached)


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("block_size", "one", "salt"),
    [(128, image("cat"), None), (16, named("cat"), "s"), (256, image("cat"), "s")],
    ids=["data", "uuid", "coarse"],
)
async def test_the_hit_of_a_prompt_with_an_image_that_was_seen_is_predicted_whole(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, template: Path, block_size: int, one: Json, salt: str | None
) -> None:
    salted = {"cache_salt": salt} if salt else {}
    body = chat(words("a", 200), one, words("b", 900), **salted)
    other = chat(words("a", 200), image("dog") | ({"uuid": "dog"} if "uuid" in one else {}), words("b", 900), **salted)
    async with virtual_fleet(loop, tokenizer, config(block_size), pods=1, chat_template=str(template)) as target:
        await learn(target, body)
        again = await target.ask(CHAT, body)
        assert again.cached > 1200
        assert is_close(again.predicted, again.cached, block_size)
        if "uuid" in one:
            alone = {"type": "image_url", "image_url": None, "uuid": one["uuid"]}
            unsent = await target.ask(CHAT, chat(words("a", 200), alone, words("b", 900), **salted))
            assert unsent == again
        different = await target.ask(CHAT, other)
        assert different.cached < 256
        assert different.predicted <= different.cached
        unsalted = await target.ask(CHAT, {**body, "cache_salt": "other"})
        assert (unsalted.predicted, unsalted.cached) == (0, 0)


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("block_size", "more"),
    [
        (16, {}),
        (128, {"attention": ("full", "sliding:300")}),
        (32, {"attention": ("full", "mamba")}),
        (32, {"speculative": "lookahead", "attention": ("full", "sliding:100")}),
        (64, {"data_parallel_size": 2}),
        (64, {"loras": ("french",)}),
    ],
    ids=["plain", "windows", "states", "lookahead", "ranks", "adapter"],
)
async def test_after_concurrent_conversations_every_hit_is_predicted(
    loop: VirtualTimeLoop, tokenizer: LocalTokenizer, template: Path, block_size: int, more: Json
) -> None:
    draw = random.Random(block_size)
    pictures = [image(f"cat{number}") for number in range(4)] + [
        named(f"dog{number}", size=SIZE + 99) for number in range(4)
    ]

    async def talk(number: int) -> Json:
        """Three turns, the first two of which have images that others have as well."""
        body = chat(
            words("shared" if number % 2 else str(number), 150),
            model="french" if more.get("loras") and number % 3 else "m",
        )
        if number % 4 == 3:
            body["cache_salt"] = "s"
        for turn in range(3):
            await asyncio.sleep(draw.random())
            parts = body["messages"][-1]["content"]
            if turn < 2:
                parts += [draw.choice(pictures), words(f"{number} {turn}", 60)]
            answer, _ = await target.post(CHAT, body)
            said = answer["choices"][0]["message"]["content"]
            body["messages"] += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": [words(f"then {number} {turn}", 30)]},
            ]
        return body

    engine = config(block_size, **more)
    async with virtual_fleet(loop, tokenizer, engine, pods=2, chat_template=str(template)) as target:
        await asyncio.gather(*(talk(number) for number in range(8)))
        await asyncio.sleep(SETTLED_SECONDS)
        bodies = await asyncio.gather(*(talk(number) for number in range(8, 16)))
        await target.settled()
        await asyncio.sleep(SETTLED_SECONDS)
        answers = []
        for body in bodies:
            await target.settled()
            answers.append(await target.ask(CHAT, body))
        assert all(is_close(each.predicted, each.cached, block_size) for each in answers)
        assert min(each.cached for each in answers) > 600


async def request(session: aiohttp.ClientSession, addresses: Json, body: Json) -> tuple[int, Json]:
    """What is predicted of a request, and the usage that the answer reports."""
    async with session.post(f"{addresses['admin']}/debug/route", params={"path": CHAT}, json=body) as response:
        decision = await response.json()
    async with session.post(addresses["listen"] + CHAT, json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        pod = decision["pods"][response.headers["x-matrixinfer-pod"]]
    return pod["predicted_hit_tokens"], {"known": decision["tokens"], **answer["usage"]}


async def test_processes_that_serve_many_clients_and_a_gateway_that_begins_later(
    template: Path, tmp_path: Path
) -> None:
    options = ("--chat-template", str(template), "--tokenizer", str(TOKENIZER), "--media-token", PLACEHOLDER)
    bodies = [
        chat(words("a", 100), one, words("b", 500), model="sim", **salted)
        for one in [image("cat"), image("dog"), named("cow"), named("owl")]
        for salted in [{}, {"cache_salt": "s"}]
    ]
    async with (
        engine(*options, "--block-size", "128", "--num-gpu-blocks-override", "2000") as (_, first),
        engine(*options, "--block-size", "128", "--num-gpu-blocks-override", "2000") as (_, second),
        aiohttp.ClientSession() as session,
    ):
        model = {"name": "sim", "tokenizer": str(TOKENIZER), "chatTemplate": str(template)}
        pods = [{"name": f"pod-{number}", "url": each["url"]} for number, each in enumerate([first, second])]
        file = tmp_path / "gateway.yaml"
        file.write_text(json.dumps({"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "models": [model], "pods": pods}))

        async def all_are_predicted(addresses: Json) -> bool:
            answers = [await request(session, addresses, body) for body in bodies]
            assert all(predicted <= usage["prompt_tokens_details"]["cached_tokens"] for predicted, usage in answers)
            return all(
                usage["known"] == usage["prompt_tokens"]
                and predicted == usage["prompt_tokens_details"]["cached_tokens"] > 800
                for predicted, usage in answers
            )

        async def all_are_followed(addresses: Json) -> bool:
            url = f"{addresses['admin']}/debug/route"
            async with session.post(url, params={"path": CHAT}, json=bodies[0]) as response:
                decision = await response.json()
            return [pod.get("trust") for pod in decision.get("pods", {}).values()] == ["exact"] * 2

        async def is_learnt(addresses: Json) -> bool:
            """All clients at a time say something of their own, after which all is known."""
            for body in bodies:
                said = words(str(draw.random()), 300)["text"]
                body["messages"] += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": said}]
            await asyncio.gather(*(request(session, addresses, body) for body in bodies))
            await asyncio.sleep(SETTLED_SECONDS)
            return await all_are_predicted(addresses)

        draw = random.Random(1)
        async with gateway("--config", str(file)) as (_, addresses):
            await eventually(lambda: all_are_followed(addresses), pause=0.1)
            await asyncio.gather(*(request(session, addresses, body) for body in bodies))  # alike but for the images
            await eventually(lambda: is_learnt(addresses))
        async with gateway("--config", str(file)) as (_, addresses):
            await eventually(lambda: all_are_followed(addresses), pause=0.1)
            await eventually(lambda: is_learnt(addresses))
