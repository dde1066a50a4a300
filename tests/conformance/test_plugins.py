"""What every scheduler plugin must do, whoever wrote it: each registered plugin runs through all of this.

A plugin is judged through the scheduler, alone in its profile, so that a stage that breaks the contract shows as
rejected.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Set
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrixinfer.config import PluginRef, PluginsConfig, PluginStage, SchedulerConfig, convert
from matrixinfer.scheduler.framework import (
    Candidate,
    Filter,
    Picker,
    PostSchedule,
    SchedulingRequest,
    Scorer,
    Services,
)
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.scheduler import Scheduler

REGISTRY = discover()
STAGES = (("filter", Filter), ("score", Scorer), ("picker", Picker), ("post_schedule", PostSchedule))


every_plugin = pytest.mark.parametrize("name", sorted(REGISTRY))

counts = st.integers(0, 10_000)
maybe_counts = st.none() | counts
candidates = st.lists(
    st.builds(
        Candidate,
        name=st.text(max_size=8),
        url=st.just("http://pod"),
        in_flight=counts,
        queued_tokens=counts,
        running=maybe_counts,
        waiting=maybe_counts,
        cache_usage=st.none() | st.floats(-0.1, 1.1),
        metrics_age=st.none() | st.floats(0, 60),
        matched_blocks=maybe_counts,
        pending_blocks=counts,
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda pod: pod.name,
)
requests = st.builds(
    SchedulingRequest,
    id=st.just("r"),
    model=st.sampled_from(["m", "n"]),
    prompt_tokens=st.none() | st.integers(0, 10**6),
    block_size=st.integers(1, 256),
    chain=st.lists(st.integers(0, 2**63 - 1), max_size=20).map(tuple),
    prefix=st.sampled_from([b"", b"short", b"x" * 600, b"y" * 2000]),
    session=st.none() | st.just("s"),
    now=st.floats(0, 1e6),
)


def alone(name: str, rng: random.Random) -> Scheduler:
    """A scheduler with this plugin at every stage that it has, and nothing else but the picker that must be."""
    stages = {
        stage: PluginStage(enabled=(PluginRef(name=name),))
        for stage, kind in STAGES
        if issubclass(REGISTRY[name], kind)
    }
    empty = {stage: PluginStage() for stage, _ in STAGES}
    plugins = PluginsConfig(**{**empty, "picker": PluginStage(enabled=(PluginRef(name="max-score"),)), **stages})
    return Scheduler(SchedulerConfig(plugin_config=(), plugins=plugins), Services(clock=lambda: 0.0, rng=rng), REGISTRY)


def state(value: Any) -> Any:
    """All that a value holds, in plain and comparable form. Order counts in mappings too."""
    if value is None or callable(value) or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Mapping):
        return [(state(key), state(item)) for key, item in value.items()]
    if isinstance(value, Set):
        return sorted(repr(state(item)) for item in value)
    if isinstance(value, Iterable):
        return [state(item) for item in value]
    names = list(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = getattr(kind, "__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return type(value), [(name, state(getattr(value, name))) for name in names if hasattr(value, name)]


@every_plugin
@settings(max_examples=60, deadline=None)
@given(asked=requests, pods=candidates)
def test_answers_are_aligned_finite_and_in_range(name: str, asked: SchedulingRequest, pods: list[Candidate]) -> None:
    scheduler = alone(name, random.Random(0))
    decision = scheduler.schedule(asked, pods)
    assert not any(scheduler.rejected.values()), decision.notes
    assert sorted(pod.name for pod in decision.ranked) == sorted({pod.name for pod in pods} - set(decision.filtered))


@every_plugin
@settings(max_examples=30, deadline=None)
@given(asked=requests, pods=candidates)
def test_request_and_candidates_are_left_as_they_were(
    name: str, asked: SchedulingRequest, pods: list[Candidate]
) -> None:
    before = copy.deepcopy((asked, pods))
    decision = alone(name, random.Random(0)).schedule(asked, pods)
    assert (asked, pods) == before
    assert list(decision.candidates) == pods


@every_plugin
@settings(max_examples=30, deadline=None)
@given(history=st.lists(st.tuples(requests, candidates), max_size=4), asked=requests, pods=candidates)
def test_dry_runs_change_nothing_and_repeat_themselves(
    name: str,
    history: list[tuple[SchedulingRequest, list[Candidate]]],
    asked: SchedulingRequest,
    pods: list[Candidate],
) -> None:
    rng = random.Random(0)
    scheduler = alone(name, rng)
    for past, there in history:
        scheduler.schedule(past, there)
    before = copy.deepcopy((state(scheduler.plugins), rng.getstate(), scheduler.rejected))
    runs = [scheduler.schedule(asked, pods, dry_run=True) for _ in range(3)]
    assert (state(scheduler.plugins), rng.getstate(), scheduler.rejected) == before
    assert runs[0] == runs[1] == runs[2]
    assert scheduler.schedule(asked, pods).ranked == runs[0].ranked


@every_plugin
def test_pods_of_which_nothing_is_known_are_taken(name: str) -> None:
    scheduler = alone(name, random.Random(0))
    asked = SchedulingRequest(id="r", model="m", prompt_tokens=None, block_size=16, chain=(), prefix=b"")
    decision = scheduler.schedule(asked, [Candidate(name=str(i), url="") for i in range(3)])
    assert not any(scheduler.rejected.values()), decision.notes
    assert len(decision.ranked) == 3


@every_plugin
def test_an_empty_list_of_candidates_gives_an_empty_answer(name: str) -> None:
    kind = REGISTRY[name]
    made = kind(convert({}, kind.Args, path="$"), Services(clock=lambda: 0.0, rng=random.Random(0)))
    asked = SchedulingRequest(id="r", model="m", prompt_tokens=64, block_size=16, chain=(1, 2), prefix=b"x" * 2000)
    if isinstance(made, Filter):
        assert list(made.filter(asked, [])) == []
    if isinstance(made, Scorer):
        assert list(made.score(asked, []).values) == []
    if isinstance(made, Picker):
        assert list(made.pick(asked, [], [])) == []


@every_plugin
def test_it_is_registered_under_its_name_and_documented(name: str) -> None:
    plugin = REGISTRY[name]
    assert plugin.name == name
    assert plugin.__doc__
    assert any(issubclass(plugin, kind) for _, kind in STAGES)
    hints = get_type_hints(plugin.Args, include_extras=True)
    for field in msgspec.structs.fields(plugin.Args):
        hint = hints[field.name]
        assert get_origin(hint) is Annotated, f"{field.encode_name} is not described"
        notes = [note for note in get_args(hint)[1:] if isinstance(note, msgspec.Meta)]
        assert any(note.description for note in notes), f"{field.encode_name} is not described"
