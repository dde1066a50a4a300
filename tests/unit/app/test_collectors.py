from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import Metric

from matrixinfer.app.collectors import FeedCollector
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.index.memory import MemoryIndex
from matrixinfer.kvevents import limits
from matrixinfer.kvevents.feed import FeedState, PodFeed
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.scheduler.framework import Trust


def samples(metrics: Iterator[Metric]) -> dict[tuple[str, ...], float]:
    return {(s.name, *s.labels.values()): s.value for metric in metrics for s in metric.samples}


def test_a_feed_shows_its_state_and_what_was_wrong_with_its_frames() -> None:
    ledger = Ledger(pod="a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex())
    feed = PodFeed(ledger, can_replay=True)
    feed.stats.wrong_topic = 3
    feed.disconnected()
    shown = samples(FeedCollector({"a": feed}, lambda _: False, lambda _: 0.5).collect())
    states = {state: shown["matrixinfer_kv_feed_state", "a", state.value] for state in FeedState}
    assert states == {state: float(state is FeedState.STALE) for state in FeedState}
    assert shown["matrixinfer_kv_trust", "a", "stale"] == 1
    assert shown["matrixinfer_kv_frames_total", "a", "wrong_topic"] == 3


def test_a_pod_whose_answers_differ_is_shown_as_doubted() -> None:
    feed = PodFeed(Ledger(pod="a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex()), can_replay=False)
    for doubtful, trust in ((set[str](), "partial"), ({"a"}, "stale")):
        shown = samples(FeedCollector({"a": feed}, doubtful.__contains__, lambda _: 1.0).collect())
        assert [level for level in get_args(Trust) if shown["matrixinfer_kv_trust", "a", level]] == [trust]


def test_a_feed_shows_how_much_it_has_received_and_still_holds() -> None:
    ledger = Ledger(pod="a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex())
    feed = PodFeed(ledger, can_replay=True)
    feed.live(3, b"held")
    shown = samples(FeedCollector({"a": feed}, lambda _: False, lambda _: 0.5).collect())
    assert shown["matrixinfer_kv_held_frames", "a"] == 1
    assert shown["matrixinfer_kv_received_bytes_total", "a"] == 4
    assert ("matrixinfer_kv_last_frame_timestamp_seconds", "a") not in shown
    feed.stats.last_frame_at = 1.5
    shown = samples(FeedCollector({"a": feed}, lambda _: False, lambda _: 0.5).collect())
    assert shown["matrixinfer_kv_last_frame_timestamp_seconds", "a"] == 1.5
    assert ("matrixinfer_kv_lag_seconds", "a") not in shown


def test_a_feed_shows_how_far_behind_the_engine_it_is() -> None:
    ledger = Ledger(pod="a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex())
    feed = PodFeed(ledger, can_replay=False)
    feed.stats.last_frame_at = 7.0
    feed.live(0, b"\x93\xcb" + struct.pack(">d", 4.5) + b"\x90\xc0")
    assert (
        samples(FeedCollector({"a": feed}, lambda _: False, lambda _: 0.5).collect())["matrixinfer_kv_lag_seconds", "a"]
        == 2.5
    )


def test_a_feed_shows_the_limits_of_its_events_by_short_names() -> None:
    ledger = Ledger(pod="a", model="m", blocks=TokenBlockProcessor(16), index=MemoryIndex())
    ledger.skip("BlockMoved")
    ledger.skip("BlockJoined")
    feed = PodFeed(ledger, can_replay=True)
    for words in (limits.HIDDEN_COMPONENTS, limits.fewer_ranks(4, 2), limits.other_rank(1, "a@dp0"), "something else"):
        feed.remarks.note(words)
    shown = samples(FeedCollector({"a": feed}, lambda _: False, lambda _: 0.5).collect())
    names = {key[2] for key in shown if key[0] == "matrixinfer_kv_feed_limits"}
    assert names == {"components", "fewer_ranks", "other_rank", "other", "unknown_events"}
    assert names <= set(limits.NAMES)
