"""Whatever is lost on the way, an index that calls a pod exact knows what its engine holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer import Index
from matrixinfer.testing import FakeEngine

PROMPTS = [[*range(start, start + 64)] for start in (0, 1000)] + [[*range(32), *range(5000, 5048)]]
prompts = st.sampled_from(PROMPTS)
steps = st.one_of(
    st.tuples(st.just("store"), prompts),
    st.tuples(st.just("evict"), prompts),
    st.tuples(st.just("clear"), st.just([])),
    st.tuples(st.sampled_from(["restart", "disconnect", "reconnect", "resync", "heartbeat", "answer"]), st.just([])),
)


class Followed:
    """An engine, and an index that follows it over a connection that loses frames."""

    def __init__(self, *, can_replay: bool) -> None:
        self.engine, self.index = FakeEngine(), Index(block_size=16)
        self.index.follow("a", model="m", can_replay=can_replay)

    def take(self, step: str, prompt: list[int], *, lost: bool) -> None:
        index, engine = self.index, self.engine
        if step in ("store", "evict", "clear"):
            frame = engine.clear() if step == "clear" else getattr(engine, step)(prompt)
            if not lost:
                index.apply("a", *frame)
        elif step == "restart":
            engine.restart()
        elif step == "disconnect":
            index.disconnected("a")
        elif step == "reconnect":
            index.reconnected("a")
        elif step == "resync":
            index.resync("a")
        else:
            replay = index.heartbeat("a") if step == "heartbeat" else index.wanted("a")
            if replay is not None:
                frames = engine.since(replay.start)
                index.replayed(replay, frames[: len(frames) // 2] if lost else frames, whole=not lost)

    def settle(self) -> None:
        """The connection is up, the engine publishes, nothing is lost any more, and it was asked whether anything was."""
        self.index.reconnected("a")
        self.take("store", PROMPTS[0], lost=False)
        for _ in range(3):
            self.take("heartbeat", [], lost=False)
            rounds = 0
            while self.index.wanted("a") is not None:
                self.take("answer", [], lost=False)
                rounds += 1
                assert rounds < 20, "the index asks for ever"

    def check(self) -> None:
        held = {len(prompt): self.index.match(prompt, model="m").get("a", 0) for prompt in PROMPTS}
        assert held == {len(prompt): self.engine.held(prompt) for prompt in PROMPTS}


@given(st.lists(st.tuples(steps, st.booleans()), max_size=25))
def test_once_an_engine_has_been_asked_its_index_is_exact_and_right(
    history: list[tuple[tuple[str, list[int]], bool]],
) -> None:
    followed = Followed(can_replay=True)
    for (step, prompt), lost in history:
        followed.take(step, prompt, lost=lost)
    followed.settle()
    if followed.index.trust("a") == "partial":  # a replay was given up in between
        followed.index.resync("a")
        followed.settle()
    assert followed.index.trust("a") == "exact"
    followed.check()


@given(st.lists(st.tuples(steps, st.booleans()), max_size=25))
def test_without_replays_what_is_indexed_becomes_right_once_the_engine_is_empty(
    history: list[tuple[tuple[str, list[int]], bool]],
) -> None:
    followed = Followed(can_replay=False)
    for (step, prompt), lost in history:
        followed.take(step, prompt, lost=lost)
    followed.index.reconnected("a")
    followed.take("clear", [], lost=False)
    followed.take("store", PROMPTS[0], lost=False)
    assert followed.index.trust("a") == "exact"
    followed.check()
