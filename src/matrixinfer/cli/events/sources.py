"""What the commands that listen to KV events share: where to listen, and when to stop."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from matrixinfer.cli.arguments import add_engine_key, at_least_one, duration
from matrixinfer.config import KvEventsConfig
from matrixinfer.config.secrets import Secret
from matrixinfer.errors import ConfigError
from matrixinfer.pods.engine_api import EngineApi, EngineDown, OutOfResources
from matrixinfer.pods.session import client_session

_TIMEOUT_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser, *, unit: str) -> None:
    """Add the arguments of every command that listens."""
    add = parser.add_argument
    add("--replay", action="append", default=[], type=_endpoint, metavar="ENDPOINT", help="where the engine replays "
        "past events; one per ENDPOINT, in the same order. Starts with the past events, and fills gaps")  # fmt: skip
    add_engine_key(parser)
    add("--topic", help="accept only events with exactly this topic (default: every topic)")
    add("--count", type=at_least_one, metavar="N", help=f"stop after N {unit}")
    add("--seconds", type=duration, metavar="S", help="stop after S seconds")


def address(text: str) -> str:
    """An argument that names a publisher or an engine."""
    if re.match(r"https?://.", text):
        return text.rstrip("/")
    return _endpoint(text, expected="tcp://HOST:PORT, ipc://PATH, or an engine's URL such as http://HOST:PORT")


async def sources(addresses: Sequence[str], replays: Sequence[str], key: Secret | None = None) -> list[KvEventsConfig]:
    """The publishers to listen to. An engine's URL stands for the publishers that it reports, one per rank.

    The engine is asked with `key`. Raises `ConfigError`.
    """
    if len(replays) > len(addresses) or (replays and any(map(_is_url, addresses))):
        raise ConfigError(
            "--replay", "expected at most one per ENDPOINT, and none with an engine's URL, which reports its own"
        )
    found: list[KvEventsConfig] = []
    for number, where in enumerate(addresses):
        if _is_url(where):
            found += await _published_by(where, key)
        else:
            found.append(
                KvEventsConfig(endpoint=where, replay_endpoint=replays[number] if number < len(replays) else None)
            )
    if len({source.endpoint for source in found}) < len(found):
        raise ConfigError("ENDPOINT", "expected different publishers, got the same one twice")
    return found


@asynccontextmanager
async def until_stopped(seconds: float | None) -> AsyncIterator[None]:
    """Leave the context after `seconds`, on SIGINT or on SIGTERM. None of them is an error."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        async with asyncio.timeout(seconds) as limit:

            def stop() -> None:
                with suppress(RuntimeError):  # already stopping
                    limit.reschedule(loop.time())

            for number in signals:
                loop.add_signal_handler(number, stop)
            yield
    except TimeoutError:
        if not limit.expired():
            raise
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _published_by(url: str, key: Secret | None) -> tuple[KvEventsConfig, ...]:
    async with client_session(lambda _: key) as session:
        try:
            api = EngineApi(session, _TIMEOUT_SECONDS)
            served = await api.models(url)
            found = (await api.about(url, None if served is None else served.engine)).sources
        except (EngineDown, OutOfResources) as error:
            raise ConfigError("ENDPOINT", str(error)) from error
    if not found:
        raise ConfigError(
            "ENDPOINT",
            f"{url} names no publisher in /kv_event_sources or /server_info: give the tcp:// endpoint on which it "
            "publishes",
        )
    return tuple(KvEventsConfig(endpoint=source.endpoint, replay_endpoint=source.replay_endpoint) for source in found)


def _is_url(text: str) -> bool:
    return text.startswith("http")


def _endpoint(text: str, *, expected: str = "tcp://HOST:PORT or ipc://PATH") -> str:
    if not re.match(r"(tcp://[^*/]+:\d+|ipc://.+)$", text):
        raise argparse.ArgumentTypeError(f"expected {expected}, got `{text}`")
    return text
