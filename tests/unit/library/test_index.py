from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrixinfer import Index, Replay
from matrixinfer.errors import ConfigError, InvalidRequest, UnknownPod
from matrixinfer.feedtools.capture_file import CaptureReader
from matrixinfer.kvevents.feed import PodFeed
from matrixinfer.sim.events import BlockStored, EventBatch, Medium, encode
from matrixinfer.testing import FakeEngine

PROMPT = list(range(160))
CAPTURES = Path(__file__).parents[2] / "data" / "captures"


def synced(index: Index, engine: FakeEngine, pod: str = "a") -> None:
    """Follow an engine that can be replayed, and fetch what is wanted."""
    index.follow(pod, model="m", can_replay=True)
    fetch(index, engine, pod)


def fetch(index: Index, engine: FakeEngine, pod: str = "a") -> int:
    """Answer what is wanted; returns the number of answers."""
    rounds = 0
    while (replay := index.wanted(pod)) is not None:
        index.replayed(replay, engine.since(replay.start))
        rounds += 1
    return rounds


def held(index: Index, tokens: Sequence[int] = PROMPT, salt: str | None = None) -> int:
    return index.match(tokens, model="m", salt=salt).get("a", 0)


def test_history_and_live_frames_leave_what_the_engine_holds() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    engine.store(PROMPT[:64])
    synced(index, engine)
    assert (held(index), index.trust("a")) == (4, "exact")
    index.apply("a", *engine.store(PROMPT))
    assert held(index) == 10
    index.apply("a", *engine.evict(PROMPT, keep=3))
    assert held(index) == 3
    index.apply("a", *engine.clear())
    assert (held(index), index.trust("a")) == (0, "exact")


def test_until_its_history_has_come_a_pod_is_stale() -> None:
    index = Index()
    index.follow("a", model="m", can_replay=True)
    assert (index.trust("a"), index.status("a").feed) == ("stale", "syncing")


def test_without_replays_a_pod_is_partial_until_it_is_known_to_be_empty() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    engine.store(PROMPT)
    index.follow("a", model="m")
    assert index.wanted("a") is None
    index.apply("a", *engine.store(PROMPT[:32] + PROMPT[:32]))
    assert index.trust("a") == "partial"
    index.apply("a", *engine.clear())
    assert index.trust("a") == "exact"


def test_a_gap_is_fetched_again() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT[:32]))
    engine.store(PROMPT[:48])
    index.apply("a", *engine.store(PROMPT))
    assert index.trust("a") == "stale"
    assert fetch(index, engine) > 0
    assert (held(index), index.trust("a"), index.status("a").gaps) == (10, "exact", 1)


def test_live_frames_wait_for_the_history_before_them() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    engine.store(PROMPT[:64])
    index.follow("a", model="m", can_replay=True)
    replay = index.wanted("a")
    assert replay is not None
    answer = engine.since(replay.start)
    index.apply("a", *engine.store(PROMPT))
    assert held(index) == 0
    index.replayed(replay, list(answer))
    assert (held(index), index.trust("a")) == (10, "exact")


def test_a_restarted_engine_begins_again() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT))
    index.apply("a", *engine.store(PROMPT[:16] + PROMPT[:16]))
    engine.restart()
    index.apply("a", *engine.store(PROMPT[:32]))
    fetch(index, engine)
    assert (held(index), index.trust("a"), index.status("a").restarts) == (2, "exact", 1)


def test_an_engine_that_never_answers_is_given_up_after_three_rounds() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    index.follow("a", model="m", can_replay=True)
    rounds = 0
    while (replay := index.wanted("a")) is not None:
        index.replayed(replay, [], whole=False)
        rounds += 1
    assert (rounds, index.trust("a")) == (3, "partial")
    engine.store(PROMPT)
    index.resync("a")
    fetch(index, engine)
    assert (held(index), index.trust("a")) == (10, "exact")


def test_an_answer_that_breaks_off_is_asked_for_from_where_it_ended() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    for end in range(16, 161, 16):
        engine.store(PROMPT[:end])
    index.follow("a", model="m", can_replay=True)
    asked = []
    while (replay := index.wanted("a")) is not None:
        asked.append(replay.start)
        frames = engine.since(replay.start)
        index.replayed(replay, frames[:4], whole=len(frames) <= 4)
    assert asked == [0, 3, 6, 9]
    assert (held(index), index.trust("a")) == (10, "exact")


def test_answers_that_were_overtaken_are_ignored() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    engine.store(PROMPT)
    index.follow("a", model="m", can_replay=True)
    first = index.wanted("a")
    assert first is not None
    index.resync("a")
    index.replayed(first, engine.since(0))
    assert held(index) == 0
    second = index.wanted("a")
    assert second is not None
    index.forget("a")
    index.replayed(second, engine.since(0))
    index.follow("a", model="m", can_replay=True)
    index.replayed(second, engine.since(0))
    assert held(index) == 0
    assert repr(second) == "<Replay pod='a' start=0>"


class TestHeartbeats:
    def silent(self) -> tuple[Index, FakeEngine, Replay]:
        index, engine = Index(block_size=16), FakeEngine()
        synced(index, engine)
        index.apply("a", *engine.store(PROMPT[:32]))
        heartbeat = index.heartbeat("a")
        assert heartbeat is not None
        return index, engine, heartbeat

    def test_the_last_frame_alone_proves_that_nothing_was_lost(self) -> None:
        index, engine, heartbeat = self.silent()
        index.replayed(heartbeat, engine.since(heartbeat.start))
        assert (index.trust("a"), index.wanted("a")) == ("exact", None)

    def test_frames_lost_in_silence_are_fetched(self) -> None:
        index, engine, heartbeat = self.silent()
        engine.store(PROMPT)
        index.replayed(heartbeat, engine.since(heartbeat.start))
        fetch(index, engine)
        assert (held(index), index.trust("a")) == (10, "exact")

    def test_an_engine_that_misses_three_is_stale(self) -> None:
        index, _, heartbeat = self.silent()
        for _ in range(3):
            assert index.trust("a") == "exact"
            index.replayed(heartbeat, [], whole=False)
        assert index.trust("a") == "stale"

    def test_a_frame_that_came_meanwhile_makes_it_void(self) -> None:
        index, engine, heartbeat = self.silent()
        index.apply("a", *engine.store(PROMPT))
        index.replayed(heartbeat, [])
        assert (index.trust("a"), index.wanted("a")) == ("exact", None)

    def test_no_heartbeat_is_asked_for_while_history_is_fetched_or_cannot_be(self) -> None:
        index = Index()
        index.follow("a", model="m", can_replay=True)
        index.follow("b", model="m")
        assert (index.heartbeat("a"), index.heartbeat("b")) == (None, None)


def test_a_lost_connection_makes_a_pod_stale_until_its_engine_proves_itself() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT[:32]))
    index.disconnected("a")
    assert (index.trust("a"), held(index)) == ("stale", 2)
    engine.store(PROMPT)
    index.reconnected("a")
    fetch(index, engine)
    assert (index.trust("a"), held(index)) == ("exact", 10)


def test_a_frame_that_cannot_be_read_drops_what_it_may_have_removed() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT))
    index.apply("a", 1, b"no batch")
    status = index.status("a")
    assert (held(index), status.trust, status.malformed, status.frames) == (0, "partial", 1, 2)
    assert (status.model, status.engine_block, status.untrusted) == ("m", 16, None)


def test_a_fault_of_ours_over_a_frame_does_not_stop_the_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT))

    def broken(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(PodFeed, "live", broken)
        index.apply("a", *engine.store(PROMPT[:32]))
    assert (held(index), index.status("a").malformed) == (0, 1)


def test_a_forgotten_pod_leaves_nothing() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT))
    index.forget("a")
    index.forget("a")
    assert (index.pods, index.trust("a"), held(index)) == ([], "none", 0)
    assert index.stats().pods == 0


def test_a_forgotten_pod_with_a_slower_tier_leaves_nothing() -> None:
    index = Index(block_size=16)
    index.follow("a", model="m")
    index.apply("a", 0, encode(EventBatch(0.0, [stored("GPU")])))
    index.apply("a", 1, encode(EventBatch(0.0, [stored("CPU")])))
    names = {"a", "a~device"}
    assert set(index.known.memory.count("m", index.known.chain(PROMPT[:16]))) == names
    assert index.match(PROMPT[:16], model="m") == {"a": 1}
    index.forget("a")
    assert index.stats().pods == 0


def stored(medium: Medium) -> BlockStored:
    return BlockStored(
        block_hashes=[1], parent_block_hash=None, token_ids=PROMPT[:16], block_size=16, medium=medium, extra_keys=None
    )


def test_following_again_in_the_same_way_changes_nothing_and_in_another_begins_again() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT))
    index.follow("a", model="m", can_replay=True)
    assert held(index) == 10
    index.follow("a", model="n", can_replay=True)
    assert (held(index), index.pods) == (0, ["a"])


def test_salts_are_distinguished() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT, salt="tenant-1"))
    assert [held(index, salt=salt) for salt in (None, "tenant-1", "tenant-2")] == [0, 10, 0]


def test_the_memory_bound_holds() -> None:
    index, engine = Index(block_size=16, max_blocks=4), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT))
    stats = index.stats()
    assert (stats.blocks, stats.evicted, held(index)) == (4, 6, 4)


def test_every_call_for_a_pod_that_is_not_followed_says_so() -> None:
    index = Index()
    for call in (index.wanted, index.heartbeat, index.status, index.disconnected, index.reconnected, index.resync):
        with pytest.raises(UnknownPod, match="follows no pod `x`: call `follow` first"):
            call("x")
    with pytest.raises(UnknownPod):
        index.apply("x", 0, b"")


def test_wrong_values_are_named() -> None:
    with pytest.raises(ConfigError, match="block_size must be at least 1, got 0"):
        Index(block_size=0)
    with pytest.raises(ConfigError, match="max_blocks must be at least 1"):
        Index(max_blocks=0)
    with pytest.raises(ConfigError, match="scheme"):
        Index(scheme="other")  # type: ignore[arg-type]
    for ids in ([-1] * 200, [2**32] * 200, ["a"] * 200, np.arange(200, dtype=np.int64)):
        with pytest.raises(InvalidRequest, match="token_ids: expected"):
            Index().match(ids, model="m")  # type: ignore[arg-type]


def test_token_ids_may_be_an_array() -> None:
    index, engine = Index(block_size=16), FakeEngine()
    synced(index, engine)
    index.apply("a", *engine.store(PROMPT))
    assert index.match(np.array(PROMPT, dtype=np.uint32), model="m") == {"a": 10}


@pytest.mark.parametrize("scheme", ["prefix", "block"])
def test_recordings_of_an_engine_leave_an_exact_index(scheme: str) -> None:
    index = Index(block_size=16, scheme=scheme)  # type: ignore[arg-type]
    index.follow("a", model="base")
    for row in CaptureReader(CAPTURES / "capture.jsonl.gz"):
        if "payload_hex" in row:
            index.apply("a", row["seq"], bytes.fromhex(row["payload_hex"]))
    status = index.status("a")
    assert (status.trust, status.malformed, status.gaps) == ("exact", 0, 0)
    assert index.stats().blocks > 0


@pytest.mark.parametrize(
    ("seq", "payload"),
    [(-1, b""), (1 << 64, b""), ("0", b""), (None, b""), (0.0, b""), (0, "text"), (0, None), (0, 10**15), (0, [1])],
)
def test_what_is_no_frame_is_refused_and_changes_nothing(seq: Any, payload: Any) -> None:
    index, engine = Index(block_size=16), FakeEngine()
    engine.store(PROMPT)
    synced(index, engine)
    index.follow("b", model="m", can_replay=True)
    replay = index.wanted("b")
    assert replay is not None
    with pytest.raises(InvalidRequest, match="frame: expected a number"):
        index.apply("a", seq, payload)
    with pytest.raises(InvalidRequest, match="frame: expected a number"):
        index.replayed(replay, [(seq, payload)])
    assert (held(index), index.status("a").malformed, index.status("b").frames) == (10, 0, 0)
    index.replayed(replay, [])  # the question stays open
    assert index.trust("b") == "exact"


@pytest.mark.parametrize("frames", [None, 5, [5], [(0,)], [(0, b"", b"")]])
def test_an_answer_that_is_no_list_of_frames_is_refused(frames: Any) -> None:
    index = Index()
    index.follow("a", model="m", can_replay=True)
    replay = index.wanted("a")
    assert replay is not None
    with pytest.raises(InvalidRequest, match="frames: expected pairs"):
        index.replayed(replay, frames)
    assert index.wanted("a") is not None


def test_an_answer_that_is_handed_over_twice_is_no_failed_attempt() -> None:
    index = Index()
    index.follow("a", model="m", can_replay=True)
    replay = index.wanted("a")
    assert replay is not None
    for _ in range(3):
        index.replayed(replay, [])
    index.resync("a")
    replay = index.wanted("a")
    assert replay is not None
    index.replayed(replay, [], whole=False)
    assert index.wanted("a") is not None


@pytest.mark.parametrize(("pod", "model"), [(None, "m"), (5, "m"), ("a~device", "m"), ("a@dp0~host", "m"), ("a", None)])
def test_a_name_that_cannot_be_used_is_refused_and_not_followed(pod: Any, model: Any) -> None:
    index = Index()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="expected a"):
            index.follow(pod, model=model)
    assert not index.pods


@pytest.mark.parametrize(
    "setting", [{"block_size": "4"}, {"block_size": 4.0}, {"max_blocks": None}, {"max_recent_blocks": -1}]
)
def test_a_setting_that_does_not_fit_is_refused(setting: Any) -> None:
    with pytest.raises(ConfigError):
        Index(**setting)


@pytest.mark.parametrize("tokens", [b"abcdabcd", np.zeros((2, 16), dtype=np.uint32)])
def test_bytes_and_batches_are_no_token_ids(tokens: Any) -> None:
    with pytest.raises(InvalidRequest, match="token_ids: expected"):
        Index(block_size=1).match(tokens, model="m")


@pytest.mark.parametrize("salt", [5, b"salt", "\ud800"])
def test_a_salt_that_is_no_text_is_refused(salt: Any) -> None:
    with pytest.raises(InvalidRequest, match="salt: expected"):
        Index().match([1], model="m", salt=salt)
