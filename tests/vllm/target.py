"""A gateway in front of real engines, whose predicted hits are compared with the hits that the engines report."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

from matrixinfer.app.service import Service
from matrixinfer.config import (
    BlocksConfig,
    Config,
    DriftConfig,
    KvEventsConfig,
    ModelConfig,
    PodConfig,
    SchedulerConfig,
    TokenizationConfig,
)
from matrixinfer.kvevents.feed import PodFeed
from tests.waiting import eventually

from .engine import NAME, Engine
from .model import tokenizer_of
from .probe import Probe
from .recording import Recording
from .results import Tally

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Json = dict[str, Any]


class Outcome(NamedTuple):
    """What the gateway recorded about a request."""

    predicted: int
    """Predicted hit in tokens, at the time of the decision."""
    cached: int
    """Reported hit in tokens."""


class Answer(NamedTuple):
    """The result of one request."""

    predicted: int
    """Predicted hit in tokens, at the endpoint that answered."""
    cached: int
    """Reported hit in tokens."""
    endpoint: str
    best: int
    """The longest predicted hit of any endpoint."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """The gateway, with a client. Pods are named `pod-0`, `pod-1`, …"""

    service: Service
    session: aiohttp.ClientSession
    probe: Probe
    recording: Recording | None = None
    """Takes the requests that `ask` sends, whose prompt is token ids."""

    @property
    def feeds(self) -> Mapping[str, PodFeed]:
        """The feeds, by endpoint."""
        return self.service.engines.subscriber.feeds

    async def ask(self, tally: Tally, path: str, body: Json) -> Answer:
        """Send a request, after every event of the previous ones has arrived, and add it to the tally."""
        body = {"model": NAME, "temperature": 0, "max_tokens": 4, **body}
        await self.wait_for_events()
        if self.recording is not None:
            await self.recording.take_frames()
        decision = await self.explain(path, body)
        async with self.session.post(self.service.gateway.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            endpoint = response.headers["x-matrixinfer-pod"]
            text, usage = await (_streamed if body.get("stream") else _whole)(response)
        assert usage["prompt_tokens"] == decision["tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        hits = {name: pod["predicted_hit_tokens"] for name, pod in decision["pods"].items()}
        tally.add(hits[endpoint], cached)
        if hits[endpoint] != cached:
            print(f"{decision['tokens']} tokens: predicted {hits[endpoint]}, reported {cached}", flush=True)
        if self.recording is not None:
            await self.recording.add(body, body["prompt"], cached)
        return Answer(hits[endpoint], cached, endpoint, max(hits.values()), text)

    async def explain(self, path: str, body: Json) -> Json:
        """The decision that the gateway would make now."""
        url = f"{self.service.gateway.admin_url}/debug/route"
        async with self.session.post(url, params={"path": path}, json=body) as response:
            assert response.status == 200, await response.text()
            decision: Json = await response.json()
            return decision

    async def metric(self, *parts: str) -> float:
        """The sum of the gateway's series that start with the first of `parts` and contain the others."""
        async with self.session.get(f"{self.service.gateway.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith(parts[0]) and all(part in line for part in parts[1:])
        )

    def recorded(self, request_id: str) -> Outcome:
        """What the gateway recorded about a finished request."""
        record = next(self.service.state.decisions.newest(request_id=request_id))
        assert record.counted is not None, "the engine reported no usage"
        predicted = record.view()["predicted_hit_tokens"]
        assert isinstance(predicted, int)
        return Outcome(predicted, record.cached or 0)

    async def abort(self, path: str, body: Json, *, after: int) -> None:
        """Send a request, and disconnect after this many events of its stream."""
        body = {"model": NAME, "temperature": 0, "max_tokens": 200, "ignore_eos": True, "stream": True, **body}
        async with self.session.post(self.service.gateway.url + path, json=body) as response:
            assert response.status == 200
            for _ in range(after):
                await response.content.readuntil(b"\n\n")
            response.close()

    async def wait_for_events(self) -> None:
        """Wait until the gateway has every event that the engines published."""
        await self.probe.settled(self.feeds)

    async def wait_for_complete_feeds(self, count: int) -> None:
        """Wait until there are `count` feeds, and all are complete."""
        await eventually(lambda: [feed.state.value for feed in self.feeds.values()] == ["complete"] * count)


async def _whole(response: aiohttp.ClientResponse) -> tuple[str, Json]:
    answer = await response.json()
    choice = answer["choices"][0]
    return choice.get("text") or (choice.get("message") or {}).get("content") or "", answer["usage"]


async def _streamed(response: aiohttp.ClientResponse) -> tuple[str, Json]:
    text = ""
    usage: Json = {}
    async for line in response.content:
        data = line.removeprefix(b"data: ").strip()
        if not data or data == b"[DONE]":
            continue
        chunk = json.loads(data)
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return text, usage


def feeds_of(number: int, engine: Engine) -> list[str]:
    """The gateway's names of an engine's feeds, by rank."""
    ranks = engine.options.ranks
    return [f"pod-{number}@dp{rank}" for rank in range(ranks)] if ranks > 1 else [f"pod-{number}"]


@asynccontextmanager
async def gateway(
    engines: Sequence[Engine],
    *,
    hashed: int = 32,
    events: Mapping[int, str] | None = None,
    injects_usage: bool = False,
    followed: int | None = None,
    sends_ids: bool = False,
) -> AsyncIterator[Target]:
    """A gateway with token blocks of `hashed` tokens. `events` replaces the event endpoints of engines, by number.

    Waits until `followed` feeds are complete; None means those of every rank.
    """
    pods = []
    replays: dict[str, str] = {}
    for number, engine in enumerate(engines):
        replays |= {feed: engine.replays_of(rank) for rank, feed in enumerate(feeds_of(number, engine))}
        through = KvEventsConfig(
            endpoint=(events or {}).get(number, engine.events), replay_endpoint=engine.replays_of(0), topic="kv-events"
        )
        discovered = engine.options.ranks > 1
        pods.append(PodConfig(name=f"pod-{number}", url=engine.url, kv_events="discover" if discovered else through))
    config = Config(
        listen="127.0.0.1:0",
        admin="127.0.0.1:0",
        models=(ModelConfig(name=NAME, tokenizer=str(tokenizer_of(engines[0].model))),),
        pods=tuple(pods),
        blocks=BlocksConfig(size=hashed),
        scheduler=SchedulerConfig(pending_seconds=0.0),
        drift=DriftConfig(inject_usage=injects_usage),
        tokenization=TokenizationConfig(send_ids="when_verified" if sends_ids else "never"),
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with Service(config) as service, aiohttp.ClientSession(connector=connector) as session:
        target = Target(service=service, session=session, probe=Probe(replays))
        await target.wait_for_complete_feeds(
            sum(engine.options.ranks for engine in engines) if followed is None else followed
        )
        yield target
