"""What the scheduler does with answers, good and bad."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count, repeat
from typing import Any, ClassVar

import pytest

from matrixinfer.config import PluginRef, Section
from matrixinfer.errors import NoPodAvailable
from matrixinfer.scheduler.framework import (
    Candidate,
    Decision,
    Plugin,
    SchedulingRequest,
    Scores,
    Services,
)
from matrixinfer.scheduler.plugins import BUILT_IN
from matrixinfer.scheduler.scheduler import Scheduler

from .support import FakeClock, pod, pods, profile, request, scheduler

Method = Callable[..., Any]


def own(plugin: str, **methods: Method) -> type[Plugin]:
    """A plugin class whose stages are the given functions (without `self`)."""

    class Own(Plugin):
        name: ClassVar[str] = plugin
        Args: ClassVar[type[Section]] = Section

        def __init__(self, args: Section, services: Services) -> None: ...

    for stage, method in methods.items():
        setattr(Own, stage, staticmethod(method))
    return Own


def scoring(plugin: str, *values: float, note: str | None = None) -> type[Plugin]:
    return own(plugin, score=lambda _request, _pods: Scores(values=values, note=note))


class Unprintable(str):
    __slots__ = ()

    def __format__(self, _: str) -> str:
        raise RuntimeError


def broken(*_: object) -> Any:
    raise KeyError("the prompt's own words")


def test_without_candidates_there_is_no_decision() -> None:
    with pytest.raises(NoPodAvailable, match="`m`"):
        scheduler(profile()).schedule(request(), [])


def test_totals_are_weighted_sums_and_rank_the_pods() -> None:
    made = scheduler(
        profile(scorers=(PluginRef(name="a", weight=2.0), "b")), scoring("a", 10, 50, 0), scoring("b", 100, 0, 30)
    )
    decision = made.schedule(request(), pods(3))
    assert decision.totals == {"pod-0": 120.0, "pod-1": 100.0, "pod-2": 30.0}
    assert decision.scores == {
        "a": {"pod-0": 10.0, "pod-1": 50.0, "pod-2": 0.0},
        "b": {"pod-0": 100.0, "pod-1": 0.0, "pod-2": 30.0},
    }
    assert [c.name for c in decision.ranked] == ["pod-0", "pod-1", "pod-2"]
    assert decision.chosen.name == "pod-0"


def test_filters_run_in_order_over_the_remaining_pods_and_give_their_reasons() -> None:
    seen: list[list[str]] = []

    def removing(name: str) -> Method:
        def method(_: SchedulingRequest, candidates: Sequence[Candidate]) -> list[str | None]:
            seen.append([c.name for c in candidates])
            return ["not here" if c.name == name else None for c in candidates]

        return method

    made = scheduler(
        profile(filters=("first", "second"), scorers=("a",)),
        own("first", filter=removing("pod-1")),
        own("second", filter=removing("pod-0")),
        scoring("a", 1),
    )
    decision = made.schedule(request(), pods(3))
    assert seen == [["pod-0", "pod-1", "pod-2"], ["pod-0", "pod-2"]]
    assert decision.filtered == {"pod-1": "first: not here", "pod-0": "second: not here"}
    assert [c.name for c in decision.ranked] == ["pod-2"]
    assert list(decision.totals) == ["pod-2"]
    assert len(decision.candidates) == 3


def test_a_filter_that_would_remove_all_is_ignored_and_noted() -> None:
    made = scheduler(profile(filters=("all",)), own("all", filter=lambda _r, c: ["no"] * len(c)))
    decision = made.schedule(request(), pods(2))
    assert len(decision.ranked) == 2
    assert not decision.filtered
    assert decision.notes == ("all: ignored, as it would remove every remaining pod",)
    assert made.rejected["all"] == 0


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda: Scores(values=[1.0, float("nan")]), "not between 0 and 100"),
        (lambda: Scores(values=[float("nan"), 1.0]), "not between 0 and 100"),
        (lambda: Scores(values=[1.0, float("inf")]), "not between 0 and 100"),
        (lambda: Scores(values=[100.1, 0.0]), "not between 0 and 100"),
        (lambda: Scores(values=[-0.1, 0.0]), "not between 0 and 100"),
        (lambda: Scores(values=[1.0]), "1 scores for 2 pods"),
        (lambda: Scores(values=[1.0, 2.0, 3.0]), "3 scores for 2 pods"),
        (lambda: Scores(values=count()), "3 scores for 2 pods"),  # type: ignore[arg-type]
        (lambda: Scores(values=[1.0, 2.0], note=Unprintable()), "raised RuntimeError at test_scheduler.py:"),
        (lambda: Scores(values=[1.0, 2.0], note=7), "a note that is neither text nor None"),  # type: ignore[arg-type]
        (lambda: None, "raised AttributeError at scheduler.py:"),
        (broken, "raised KeyError at test_scheduler.py:"),
    ],
)
def test_a_bad_scorer_has_no_say_and_is_counted(answer: Method, why: str) -> None:
    made = scheduler(
        profile(scorers=(PluginRef(name="bad", weight=9), "good")),
        own("bad", score=lambda _r, _c: answer()),
        scoring("good", 1, 2),
    )
    decision = made.schedule(request(), pods(2))
    assert decision.totals == {"pod-0": 1.0, "pod-1": 2.0}
    assert "bad" not in decision.scores
    (note,) = decision.notes
    assert note.startswith("bad: left out, as it ")
    assert why in note
    assert "own words" not in note
    assert made.rejected == {"bad": 1, "good": 0, "max-score": 0}


@pytest.mark.parametrize(
    "answer",
    [
        lambda _r, _c: [None],
        lambda _r, _c: [None, 1],
        lambda _r, _c: [None, Unprintable()],
        lambda _r, _c: repeat(None),
        lambda _r, _c: None,
        broken,
    ],
)
def test_a_bad_filter_removes_nothing_and_is_counted(answer: Method) -> None:
    made = scheduler(profile(filters=("bad",)), own("bad", filter=answer))
    assert len(made.schedule(request(), pods(2)).ranked) == 2
    assert made.rejected["bad"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        lambda *_: [0],
        lambda *_: [0, 0, 1],
        lambda *_: [1, 2, 3],
        lambda *_: [0.0, 1.0, 2.0],
        lambda *_: count(),
        lambda *_: None,
        broken,
    ],
)
def test_a_bad_picker_is_replaced_by_the_highest_total(answer: Method) -> None:
    made = scheduler(profile(scorers=("a",), pickers=("bad",)), own("bad", pick=answer), scoring("a", 1, 3, 2))
    decision = made.schedule(request(), pods(3))
    assert [c.name for c in decision.ranked] == ["pod-1", "pod-2", "pod-0"]
    assert made.rejected["bad"] == 1


def test_the_notes_of_scorers_carry_their_names() -> None:
    made = scheduler(profile(scorers=("a",)), scoring("a", 0, note="nothing to go by"))
    assert made.schedule(request(), pods(1)).notes == ("a: nothing to go by",)


def test_a_plugin_with_post_schedule_sees_each_decision_once() -> None:
    shown: list[tuple[str, str]] = []

    def listening(name: str) -> Method:
        return lambda _r, decision: shown.append((name, decision.chosen.name))

    made = scheduler(
        profile(filters=("both",), scorers=("both",), listeners=("only", "both")),
        own(
            "both",
            filter=lambda _r, c: [None] * len(c),
            score=lambda _r, c: Scores(values=[0.0] * len(c)),
            post_schedule=listening("both"),
        ),
        own("only", post_schedule=listening("only")),
    )
    made.schedule(request(), pods(1))
    assert shown == [("both", "pod-0"), ("only", "pod-0")]


def test_a_listener_cannot_change_the_ranking() -> None:
    made = scheduler(
        profile(listeners=("bad",)), own("bad", post_schedule=lambda _r, decision: decision.ranked.clear())
    )
    assert len(made.schedule(request(), pods(2)).attempts) == 2
    assert made.rejected["bad"] == 1


def test_a_listener_that_raises_changes_nothing_but_notes_and_count() -> None:
    shown: list[Decision] = []
    made = scheduler(
        profile(listeners=("bad", "good")),
        own("bad", post_schedule=broken),
        own("good", post_schedule=lambda _r, decision: shown.append(decision)),
    )
    decision = made.schedule(request(), pods(1))
    assert len(shown) == 1
    assert "bad: left out, as it raised KeyError" in decision.notes[0]
    assert made.rejected["bad"] == 1


def test_a_dry_run_shows_nobody_the_decision_counts_nothing_and_keeps_no_draw() -> None:
    shown: list[Decision] = []
    config = profile(scorers=("random", "bad"), listeners=("looking",))
    rng = random.Random(3)
    registry = {
        **BUILT_IN,
        "bad": own("bad", score=broken),
        "looking": own("looking", post_schedule=lambda _r, decision: shown.append(decision)),
    }
    made = Scheduler(config, Services(clock=FakeClock(), rng=rng), registry)
    before = rng.getstate()
    first = made.schedule(request(), pods(8), dry_run=True)
    again = made.schedule(request(), pods(8), dry_run=True)
    assert rng.getstate() == before
    assert first == again
    assert not shown
    assert not any(made.rejected.values())
    assert made.schedule(request(), pods(8)).ranked == first.ranked
    assert rng.getstate() != before


def test_the_draws_of_a_dry_run_are_undone_also_when_the_user_interrupts_it() -> None:
    def draw_and_die(_: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        rng.random()
        raise KeyboardInterrupt

    rng = random.Random(3)
    before = rng.getstate()
    registry = {**BUILT_IN, "dying": own("dying", score=draw_and_die)}
    made = Scheduler(profile(scorers=("dying",)), Services(clock=FakeClock(), rng=rng), registry)
    with pytest.raises(KeyboardInterrupt):
        made.schedule(request(), pods(1), dry_run=True)
    assert rng.getstate() == before


def test_time_is_taken_per_plugin_over_all_its_stages() -> None:
    clock = FakeClock()

    def taking(seconds: float, answer: Any) -> Method:
        def method(_: SchedulingRequest, second: Any) -> Any:
            clock.now += seconds
            return answer

        return method

    registry = {
        **BUILT_IN,
        "slow": own(
            "slow",
            filter=taking(0.001, [None]),
            score=taking(0.002, Scores(values=[0.0])),
            post_schedule=taking(0.004, None),
        ),
    }
    config = profile(filters=("slow",), scorers=("slow",))
    made = Scheduler(config, Services(clock=clock, rng=random.Random(0)), registry)
    decision = made.schedule(request(), pods(1))
    assert decision.timings_ms == {"slow": pytest.approx(7.0), "max-score": 0.0}


def test_ties_go_to_the_least_loaded_then_to_fewer_queued_tokens() -> None:
    candidates = [
        pod("busy", running=3, waiting=1),
        pod("queued", in_flight=1, queued_tokens=500),
        pod("idle", in_flight=1, queued_tokens=2),
    ]
    for seed in range(8):
        ranked = scheduler(profile(), seed=seed).schedule(request(), candidates).ranked
        assert [c.name for c in ranked] == ["idle", "queued", "busy"]


def test_totals_that_differ_by_noise_are_ties() -> None:
    made = scheduler(profile(scorers=("a",)), scoring("a", 30 + 1e-10, 30.0, 30 + 1e-6))
    candidates = [pod("noise", in_flight=1), pod("idle"), pod("more", in_flight=9)]
    assert [c.name for c in made.schedule(request(), candidates).ranked] == ["more", "idle", "noise"]


def test_full_ties_are_drawn_uniformly_from_the_seed() -> None:
    made, same = scheduler(profile(), seed=1), scheduler(profile(), seed=1)
    chosen = Counter(made.schedule(request(), pods(4)).chosen.name for _ in range(2000))
    assert Counter(same.schedule(request(), pods(4)).chosen.name for _ in range(2000)) == chosen
    assert sorted(chosen) == ["pod-0", "pod-1", "pod-2", "pod-3"]
    assert all(430 < count < 570 for count in chosen.values())  # 500 ± 3.6 standard deviations
