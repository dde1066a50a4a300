"""Pods that report what they are, and the feeds that follow them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import structlog

from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.config import (
    Config,
    KvEventsConfig,
    ModelConfig,
    PluginRef,
    PluginsConfig,
    PluginStage,
    PodConfig,
    SchedulerConfig,
)
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents.feed import FeedState
from matrixinfer.kvevents.follower import EventFollower
from matrixinfer.kvevents.limits import HIDDEN_COMPONENTS, UNCONFIRMED
from matrixinfer.kvevents.subscriber import Subscriber
from matrixinfer.pods.engine_kind import EngineFacts
from matrixinfer.pods.publishers import KvSource
from matrixinfer.pods.registry import Pod, ServedNames
from tests.ports import two_ports
from tests.waiting import eventually

from .kvevents_support import Engine

SOURCE = KvSource(endpoint="tcp://127.0.0.1:1", replay_endpoint="tcp://127.0.0.1:2", rank=0)
OTHER_SOURCE = KvSource(endpoint="tcp://127.0.0.1:3", rank=1)
ONE_MODEL = Config(models=(ModelConfig(name="configured"),))


def pod(*, model: str | None = "m", sources: tuple[KvSource, ...] | None = (SOURCE,)) -> Pod:
    served = None if model is None else ServedNames(base_model=model, aliases=frozenset([model]), adapters={})
    return Pod(config=PodConfig(name="a", url="http://a"), served=served, kv_sources=sources)


@pytest.fixture
async def subscriber() -> AsyncIterator[Subscriber]:
    async with Subscriber(index=MemoryIndex(), blocks=TokenBlockProcessor(16)) as subscriber:
        yield subscriber


async def test_a_pod_is_followed_under_the_model_that_it_serves(subscriber: Subscriber) -> None:
    EventFollower(subscriber, ONE_MODEL)(pod(model="m"))
    assert subscriber.feeds["a"].ledger.model == "m"


async def test_a_pod_that_reports_the_same_again_keeps_its_feed(subscriber: Subscriber) -> None:
    follow = EventFollower(subscriber, Config())
    follow(pod())
    feed = subscriber.feeds["a"]
    follow(pod())
    assert subscriber.feeds["a"] is feed


async def test_a_pod_that_comes_back_as_another_engine_is_followed_again(subscriber: Subscriber) -> None:
    follow = EventFollower(subscriber, Config())
    follow(pod())
    first = subscriber.feeds["a"]
    follow(pod(model="other"))
    second = subscriber.feeds["a"]
    assert second is not first
    assert second.ledger.model == "other"
    follow(pod(model="other", sources=(OTHER_SOURCE,)))
    assert subscriber.feeds["a"] is not second
    follow(pod(model="other", sources=()))
    assert not subscriber.feeds


async def test_a_pod_that_does_not_tell_its_model_has_the_only_configured_one(subscriber: Subscriber) -> None:
    EventFollower(subscriber, ONE_MODEL)(pod(model=None))
    assert subscriber.feeds["a"].ledger.model == "configured"


@pytest.mark.parametrize("models", [(), ("x", "y")])
async def test_without_exactly_one_configured_model_it_is_not_followed(
    subscriber: Subscriber, models: tuple[str, ...]
) -> None:
    EventFollower(subscriber, Config(models=tuple(ModelConfig(name=name) for name in models)))(pod(model=None))
    assert not subscriber.feeds


@pytest.mark.parametrize(("aware", "warnings"), [(True, 1), (False, 0)])
async def test_a_pod_without_events_is_warned_of_once_where_the_profile_wants_them(
    subscriber: Subscriber, aware: bool, warnings: int
) -> None:
    plugins = PluginsConfig() if aware else PluginsConfig(score=PluginStage(enabled=(PluginRef(name="least-request"),)))
    follow = EventFollower(subscriber, Config(scheduler=SchedulerConfig(plugins=plugins)))
    with structlog.testing.capture_logs() as logs:
        follow(pod(sources=None))
        assert not logs
        follow(pod(sources=()))
        follow(pod(sources=()))
    assert [line["event"] for line in logs] == ["kv_events_not_followed"] * warnings


async def test_every_rank_has_a_feed_of_its_own_that_goes_when_the_rank_does(subscriber: Subscriber) -> None:
    follow = EventFollower(subscriber, ONE_MODEL)
    engine = pod(sources=(SOURCE, OTHER_SOURCE))
    follow(engine)
    assert list(subscriber.feeds) == [endpoint.name for endpoint in engine.endpoints] == ["a@dp0", "a@dp1"]
    assert subscriber.feeds["a@dp0"].ledger is not subscriber.feeds["a@dp1"].ledger
    follow(pod())
    assert list(subscriber.feeds) == ["a"]
    follow(pod(sources=()))
    assert not subscriber.feeds


async def test_endpoints_that_a_pod_no_longer_has_are_reported(subscriber: Subscriber) -> None:
    gone: list[str] = []
    follow = EventFollower(subscriber, ONE_MODEL, on_gone=gone.append)
    follow(pod())
    follow(pod(sources=(SOURCE, OTHER_SOURCE)))
    assert gone == ["a"]
    follow.leave(pod(sources=(SOURCE, OTHER_SOURCE)))
    assert (sorted(gone), subscriber.feeds) == (["a", "a@dp0", "a@dp1"], {})
    follow.leave(pod(sources=()))
    assert len(gone) == 4  # a pod that was never followed is an endpoint, too


def at(engine: Engine, **more: Any) -> Pod:
    publisher = engine.publisher
    source = KvSource(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint, rank=0)
    return pod(sources=(source,), **more)


@pytest.mark.parametrize("reported", [True, False])
async def test_a_publisher_that_was_lost_is_not_believed_until_the_engine_says_again_where_it_publishes(
    reported: bool,
) -> None:
    lost: list[str] = []
    ports = two_ports()
    async with Subscriber(
        index=MemoryIndex(), blocks=TokenBlockProcessor(16), on_reconnected=lost.append
    ) as subscriber:
        follow = EventFollower(subscriber, ONE_MODEL)
        async with Engine(ports) as engine:
            state = at(engine)
            if not reported:
                config = KvEventsConfig(endpoint=engine.publisher.endpoint)
                state.config = PodConfig(name="a", url="http://a", kv_events=config)
            follow(state)
            feed = subscriber.feeds["a"]
            await eventually(lambda: feed.state is FeedState.COMPLETE)
            follow.asking(state)  # before the connection is lost: the answer says nothing about what comes after
        async with Engine(ports):
            if not reported:
                await eventually(lambda: feed.stats.replays > 1 and feed.state is FeedState.COMPLETE)
                assert lost == []
                return
            await eventually(lambda: lost == ["a"])
            follow.answered(state)
            assert (feed.state, feed.limits) == (FeedState.STALE, (UNCONFIRMED,))
            follow.asking(state)
            follow.answered(state)
            assert feed.limits == ()
            await eventually(lambda: feed.state is FeedState.COMPLETE)
    follow.answered(state)


async def test_an_engine_with_more_ranks_than_publishers_is_known_in_part_and_warned_of_once(
    subscriber: Subscriber,
) -> None:
    follow = EventFollower(subscriber, ONE_MODEL)
    state = pod(sources=(SOURCE,))
    follow(state)
    assert subscriber.feeds["a"].limits == ()
    with structlog.testing.capture_logs() as logs:
        state.facts = EngineFacts(kind="sglang", ranks=2)
        follow(state)
        follow(state)
    assert [line["event"] for line in logs] == ["kv_events_ranks_missing"]
    assert len(subscriber.feeds["a"].limits) == 1
    limit = subscriber.feeds["a"].limits[0]
    assert "has 2 data-parallel ranks, but only 1 of them says where it publishes" in limit
    state.facts = None
    follow(state)
    assert subscriber.feeds["a"].limits == ()


async def test_a_hybrid_model_on_sglang_is_known_in_part(subscriber: Subscriber) -> None:
    follow = EventFollower(subscriber, ONE_MODEL)
    state = pod()
    state.facts = EngineFacts(kind="sglang", architectures=("GptOssForCausalLM",))
    follow(state)
    assert subscriber.feeds["a"].limits == (HIDDEN_COMPONENTS,)


async def test_feeds_know_which_ranks_their_batches_may_name(subscriber: Subscriber) -> None:
    state = pod(sources=(replace(SOURCE, rank=8), replace(OTHER_SOURCE, rank=9)))
    EventFollower(subscriber, ONE_MODEL)(state)
    ranks = {name: feed.listed_ranks for name, feed in subscriber.feeds.items()}
    assert ranks == {"a@dp8": {8, 0}, "a@dp9": {9, 1}}


async def test_another_model_under_the_same_name_has_a_new_feed(subscriber: Subscriber) -> None:
    follow = EventFollower(subscriber, ONE_MODEL)
    state = pod()
    follow(state)
    first = subscriber.feeds["a"]
    assert state.served is not None
    state.served = replace(state.served, root="/models/other")
    follow(state)
    assert subscriber.feeds["a"] is not first
