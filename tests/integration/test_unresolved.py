"""Engines whose names resolve only once they are up."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import Any

import pytest

from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents import subscription
from matrixinfer.kvevents.subscriber import Subscriber
from tests.waiting import eventually

from .kvevents_support import BLOCKS, Engine, complete, held, stored


async def test_the_gateway_follows_an_engine_once_its_name_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    lookup, asked = loop.getaddrinfo, 0

    async def unknown(*_: object, **__: object) -> list[Any]:
        nonlocal asked
        asked += 1
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(subscription, "RESTART_MIN_SECONDS", 0.02)
    monkeypatch.setattr(loop, "getaddrinfo", unknown)
    index = MemoryIndex()
    async with Engine() as engine, Subscriber(index=index, blocks=BLOCKS) as subscriber:
        engine.publish(stored(0, 2))
        source = engine.source()
        live, history = (str(e).replace("127.0.0.1", "localhost") for e in (source.endpoint, source.replay_endpoint))
        feed = subscriber.follow(replace(source, endpoint=live, replay_endpoint=history))
        await eventually(lambda: asked >= 2)
        assert held(index) == 0
        monkeypatch.setattr(loop, "getaddrinfo", lookup)
        await eventually(lambda: complete(feed))
        assert held(index) == 2
