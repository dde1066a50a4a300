"""What every scheduler plugin must do, whoever wrote it.

A plugin is judged through the scheduler, alone in its profile, so that a stage that breaks the contract shows as
rejected. Examples come from hypothesis, which reports the smallest one that fails.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Set
from typing import Annotated, Any, ClassVar, cast, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from matrixinfer.config import PluginArgs, PluginRef, PluginsConfig, PluginStage, SchedulerConfig, Section, convert
from matrixinfer.scheduler.framework import (
    Candidate,
    Condition,
    Decision,
    Filter,
    Picker,
    Plugin,
    PostSchedule,
    SchedulingRequest,
    Scorer,
    Services,
)
from matrixinfer.scheduler.plugins import BUILT_IN
from matrixinfer.scheduler.scheduler import Scheduler
from matrixinfer.testing.expect import expect, expect_equal

_STAGES: tuple[tuple[str, type], ...] = (
    ("filter", Filter),
    ("score", Scorer),
    ("picker", Picker),
    ("post_schedule", PostSchedule),
)

_counts = st.integers(0, 10_000)
_maybe_counts = st.none() | _counts
_conditions = st.builds(
    Condition,
    prefill_rate=st.none() | st.floats(1, 1e6),
    held_tokens=_maybe_counts,
    cache_tokens=_maybe_counts,
    evicted_per_second=st.floats(0, 1e6),
)
_candidates = st.lists(
    st.builds(
        Candidate,
        name=st.text(max_size=8),
        url=st.just("http://pod"),
        in_flight=_counts,
        queued_tokens=_counts,
        foreign=_maybe_counts,
        queue_seconds=st.none() | st.floats(0, 1e4),
        condition=_conditions,
        running=_maybe_counts,
        waiting=_maybe_counts,
        cache_usage=st.none() | st.floats(-0.1, 1.1),
        metrics_age=st.none() | st.floats(0, 60),
        matched_blocks=_maybe_counts,
        pending_blocks=_counts,
        recent_chunks=_counts,
        guessed_tokens=_counts,
        reuse=st.floats(0.1, 1.0),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda pod: pod.name,
)
_requests = st.builds(
    SchedulingRequest,
    id=st.just("r"),
    model=st.sampled_from(["m", "n"]),
    prompt_tokens=st.none() | st.integers(0, 10**6),
    block_size=st.integers(1, 256),
    chain=st.lists(st.integers(0, 2**63 - 1), max_size=20).map(tuple),
    prefix=st.sampled_from([b"", b"short", b"x" * 600, b"y" * 2000]),
    session=st.none() | st.just("s"),
    streams=st.booleans(),
    now=st.floats(0, 1e6),
    unknown_tokens=_counts,
    other_tokens=_counts,
    chunks=st.lists(st.integers(0, 2**63 - 1), max_size=20).map(tuple),
)


class PluginConformance:
    """The suite. Name the plugin in a subclass, and pytest runs every method that begins with `test_`.

    For example::

        class TestRack(PluginConformance):
            plugin = Rack
            args = {"prefix": "a-"}

    Without pytest, `TestRack().run()` does the same.
    """

    plugin: ClassVar[type[Plugin]]
    args: ClassVar[Mapping[str, object]] = {}
    """Its arguments, as they stand in YAML."""
    max_examples: ClassVar[int] = 60

    def run(self) -> None:
        """Run every test. Raises `AssertionError` at the first that fails."""
        for name in dir(self):
            if name.startswith("test_"):
                getattr(self, name)()

    def test_it_has_a_name_a_stage_and_documented_arguments(self) -> None:
        plugin = self._plugin()
        expect(isinstance(getattr(plugin, "name", None), str), f"{plugin.__qualname__}.name: expected a string")
        expect(bool(plugin.__doc__), f"{plugin.__qualname__}: expected a docstring that says what it does")
        expect(
            bool(self._stages()),
            f"{plugin.__qualname__}: expected a method `filter`, `score`, `pick` or `post_schedule`",
        )
        hints = get_type_hints(plugin.Args, include_extras=True)
        for field in msgspec.structs.fields(plugin.Args):
            hint = hints[field.name]
            notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
            described = any(isinstance(note, msgspec.Meta) and note.description for note in notes)
            expect(described, f"the argument `{field.encode_name}`: expected `Annotated[..., described(...)]`")

    def test_answers_are_aligned_finite_and_in_range(self) -> None:
        @self._settings(1.0)
        @given(asked=_requests, pods=_candidates)
        def check(asked: SchedulingRequest, pods: list[Candidate]) -> None:
            self._decide(asked, pods)

        check()

    def test_request_and_candidates_are_left_as_they_were(self) -> None:
        @self._settings(0.5)
        @given(asked=_requests, pods=_candidates)
        def check(asked: SchedulingRequest, pods: list[Candidate]) -> None:
            before = copy.deepcopy((asked, pods))
            decision = self._decide(asked, pods)
            expect((asked, pods) == before, "the plugin changed the request or a candidate")
            expect(list(decision.candidates) == pods, "the plugin changed the list of candidates")

        check()

    def test_dry_runs_change_nothing_and_repeat_themselves(self) -> None:
        @self._settings(0.5)
        @given(history=st.lists(st.tuples(_requests, _candidates), max_size=4), asked=_requests, pods=_candidates)
        def check(
            history: list[tuple[SchedulingRequest, list[Candidate]]], asked: SchedulingRequest, pods: list[Candidate]
        ) -> None:
            rng = random.Random(0)  # noqa: S311
            scheduler = self._scheduler(rng)
            for past, there in history:
                scheduler.schedule(past, there)
            before = copy.deepcopy((_state(scheduler.plugins), rng.getstate(), scheduler.rejected))
            first, *others = (scheduler.schedule(asked, pods, dry_run=True) for _ in range(3))
            after = (_state(scheduler.plugins), rng.getstate(), scheduler.rejected)
            expect(after == before, "a dry run changed the plugin's state; only `post_schedule` may")
            expect_equal(others, [first, first], "the dry runs after the first")
            expect_equal(scheduler.schedule(asked, pods).ranked, first.ranked, "the ranking after the dry runs")

        check()

    def test_pods_without_known_facts_are_kept(self) -> None:
        asked = SchedulingRequest(id="r", model="m", prompt_tokens=None, block_size=16, chain=(), prefix=b"")
        decision = self._decide(asked, [Candidate(name=str(i), url="") for i in range(3)])
        expect(len(decision.ranked) == 3, f"unknown is not zero, but a filter removed pods: {dict(decision.filtered)}")

    def test_an_empty_list_of_candidates_gives_an_empty_answer(self) -> None:
        made = self._made(random.Random(0))  # noqa: S311
        asked = SchedulingRequest(id="r", model="m", prompt_tokens=64, block_size=16, chain=(1, 2), prefix=b"x" * 2000)
        if isinstance(made, Filter):
            expect_equal(list(made.filter(asked, [])), [], "filter() of no candidates")
        if isinstance(made, Scorer):
            expect_equal(list(made.score(asked, []).values), [], "score() of no candidates")
        if isinstance(made, Picker):
            expect_equal(list(made.pick(asked, [], [])), [], "pick() of no candidates")

    def _plugin(self) -> type[Plugin]:
        """The plugin's class, once it has what every test needs."""
        plugin: Any = getattr(self, "plugin", None)
        suite = type(self).__qualname__
        expect(isinstance(plugin, type), f"{suite}.plugin: expected the class of your plugin, as in `plugin = Rack`")
        args: object = getattr(plugin, "Args", None)
        is_section = isinstance(args, type) and issubclass(args, Section)
        expect(
            is_section,
            f"{plugin.__qualname__}.Args: expected a class derived from `matrixinfer.config.Section`, also if the plugin "
            "takes no arguments",
        )
        return cast("type[Plugin]", plugin)

    def _stages(self) -> list[str]:
        return [stage for stage, kind in _STAGES if issubclass(self._plugin(), kind)]

    def _made(self, rng: random.Random) -> Plugin:
        plugin = self._plugin()
        args = convert(dict(self.args), plugin.Args, path="$.args")
        return plugin(args, Services(clock=lambda: 0.0, rng=rng))

    def _scheduler(self, rng: random.Random) -> Scheduler:
        """A scheduler with this plugin at every stage that it has, and no other plugin except the picker that every profile needs."""
        plugin = self._plugin()
        name = plugin.name
        stages = {stage: PluginStage() for stage, _ in _STAGES} | {
            "picker": PluginStage(enabled=(PluginRef(name="max-score"),))
        }
        stages |= {stage: PluginStage(enabled=(PluginRef(name=name),)) for stage in self._stages()}
        config = SchedulerConfig(
            plugin_config=(PluginArgs(name=name, args=dict(self.args)),), plugins=PluginsConfig(**stages)
        )
        return Scheduler(config, Services(clock=lambda: 0.0, rng=rng), {**BUILT_IN, name: plugin})

    def _decide(self, asked: SchedulingRequest, pods: list[Candidate]) -> Decision:
        """Schedule with this plugin alone; fails when the scheduler rejects what the plugin answers."""
        scheduler = self._scheduler(random.Random(0))  # noqa: S311
        decision = scheduler.schedule(asked, pods)
        expect(not any(scheduler.rejected.values()), f"the scheduler rejected an answer: {list(decision.notes)}")
        names = sorted(pod.name for pod in decision.ranked)
        expect_equal(names, sorted({pod.name for pod in pods} - set(decision.filtered)), "the pods ranked")
        return decision

    def _settings(self, share: float) -> settings:
        self._plugin()  # what it lacks needs no example, and no time to find the smallest one
        return settings(max_examples=max(1, int(self.max_examples * share)), deadline=None)


def _state(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """All that a value holds, in plain and comparable form. Order counts in mappings too."""
    if value is None or callable(value) or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, random.Random):
        return value.getstate()
    if id(value) in within:
        return "a cycle"
    within |= {id(value)}
    if isinstance(value, Mapping):
        return [(_state(key, within), _state(item, within)) for key, item in value.items()]
    if isinstance(value, Set):
        return sorted(repr(_state(item, within)) for item in value)
    if isinstance(value, Iterable):
        return [_state(item, within) for item in value]
    names = list(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = getattr(kind, "__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return type(value), [(name, _state(getattr(value, name), within)) for name in names if hasattr(value, name)]
