"""Mistakes in the profile are fatal, and named at their key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import pytest

from matrixinfer.config import PluginArgs, PluginRef, SchedulerConfig, Section, described
from matrixinfer.errors import ConfigError
from matrixinfer.scheduler.framework import Plugin, Services

from .support import pods, profile, request, scheduler


class Strict(Plugin):
    name: ClassVar[str] = "strict"

    class Args(Section, frozen=True):
        needed: Annotated[int, described("Has no default.")]

    def __init__(self, args: Args, services: Services) -> None:
        self.needed = args.needed

    def post_schedule(self, request: object, decision: object) -> None: ...


def both(name: str) -> PluginArgs:
    return PluginArgs(name=name, args={})


@pytest.mark.parametrize(
    ("config", "path", "words"),
    [
        (
            profile(scorers=("random", "kvcache-awar")),
            "$.scheduler.plugins.Score.enabled[1]",
            (
                "did you mean `kvcache-aware`?",
                "bounded-load, expected-ttft, gpu-cache-usage, kvcache-aware, least-prefill, least-request",
            ),
        ),
        (
            profile(filters=("zzz",)),
            "$.scheduler.plugins.Filter.enabled[0]",
            ("unknown plugin `zzz`; expected one of: bounded-load,",),
        ),
        (
            profile(filters=("random",)),
            "$.scheduler.plugins.Filter.enabled[0]",
            ("cannot run at stage Filter; expected one of: bounded-load, expected-ttft, least-request",),
        ),
        (
            profile(listeners=("random",)),
            "$.scheduler.plugins.PostSchedule.enabled[0]",
            ("expected one of: round-robin",),
        ),
        (
            profile(scorers=("random", PluginRef(name="random", weight=2))),
            "$.scheduler.plugins.Score.enabled[1]",
            ("already enabled",),
        ),
        (
            profile(scorers=(PluginRef(name="random", weight=float("inf")),)),
            "$.scheduler.plugins.Score.enabled[0].weight",
            ("finite",),
        ),
        (profile(pickers=()), "$.scheduler.plugins.Picker.enabled", ("exactly one picker, got 0",)),
        (profile(args=[both("rando")]), "$.scheduler.pluginConfig[0].name", ("did you mean `random`?",)),
        (
            profile(args=[both("random"), both("random")]),
            "$.scheduler.pluginConfig[1].name",
            ("already has its arguments",),
        ),
        (
            profile(args=[PluginArgs(name="kvcache-aware", args={"blockSizeToHash": 0})]),
            "$.scheduler.pluginConfig[0].args.blockSizeToHash",
            (">= 1",),
        ),
        (
            profile(args=[PluginArgs(name="kvcache-aware", args={"maxBlocks": 1})]),
            "$.scheduler.pluginConfig[0].args.maxBlocks",
            ("did you mean `maxBlocksToMatch`?",),
        ),
        (
            profile(scorers=("kvcache-aware",), args=[PluginArgs(name="kvcache-aware", args={"hashScheme": "block"})]),
            "$.scheduler.plugins.Score.enabled[0]",
            ("sets `Config.blocks` instead",),
        ),
        (
            profile(listeners=("strict",)),
            "$.scheduler.pluginConfig",
            ("`strict` is enabled", "missing the required key `needed`"),
        ),
    ],
)
def test_a_mistake_is_named_at_its_key(config: SchedulerConfig, path: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        scheduler(config, Strict)
    assert caught.value.path == path
    for word in words:
        assert word in caught.value.message


def test_two_pickers_are_one_too_many() -> None:
    class Other(Plugin):
        name: ClassVar[str] = "other"
        Args: ClassVar[type[Section]] = Section

        def __init__(self, args: Section, services: Services) -> None: ...

        def pick(self, request: object, candidates: object, totals: object) -> list[int]:
            return []

    with pytest.raises(ConfigError, match="exactly one picker, got 2"):
        scheduler(profile(pickers=("max-score", "other")), Other)


def test_the_default_profile_is_valid_and_routes() -> None:
    decision = scheduler(SchedulerConfig()).schedule(request(session="s"), pods(3))
    assert len(decision.ranked) == 3
    assert list(decision.scores) == ["expected-ttft", "session-affinity"]
    assert decision.notes == ("expected-ttft: the index could not say what 3 of 3 pods hold",)


def test_a_plugin_that_needs_a_session_takes_no_part_without_one() -> None:
    made = scheduler(profile(filters=("expected-ttft",), scorers=("session-affinity",)))
    first = made.schedule(request(session="s"), pods(3))
    alone = made.schedule(request(), pods(3))
    assert ("session-affinity" in first.scores, "session-affinity" in alone.scores) == (True, False)
    assert "session-affinity" not in alone.timings_ms
    assert made.schedule(request(session="s"), pods(3)).chosen.name == first.chosen.name


def test_a_plugin_enabled_at_two_stages_is_one_instance() -> None:
    made = scheduler(profile(filters=("least-request",), scorers=("least-request",)))
    assert list(made.plugins) == ["least-request", "max-score"]


def test_arguments_reach_the_plugin() -> None:
    args = [PluginArgs(name="strict", args={"needed": 7})]
    strict = scheduler(profile(listeners=("strict",), args=args), Strict).plugins["strict"]
    assert isinstance(strict, Strict)
    assert strict.needed == 7


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def made_by(constructor: Callable[..., None], args: type[Section] = Section) -> type[Plugin]:
    class Mine(Plugin):
        name: ClassVar[str] = "mine"
        Args: ClassVar[type[Section]] = args

        def score(self, request: object, candidates: object) -> None: ...

    Mine.__init__ = constructor  # type: ignore[method-assign]
    return Mine


def raising(error: BaseException) -> Callable[..., None]:
    def constructor(self: object, args: object, services: object) -> None:
        raise error

    return constructor


@pytest.mark.parametrize(
    ("constructor", "words"),
    [
        (lambda self: None, "has another signature than `__init__(self, args, services)`: TypeError: "),
        (lambda self, args, services, more: None, "has another signature than `__init__(self, args, services)`"),
        (raising(TypeError("no number")), "failed: TypeError: no number (test_profile.py:"),
        (raising(ValueError("no such rack")), "failed: ValueError: no such rack (test_profile.py:"),
        (raising(SystemExit(1)), "failed: SystemExit: 1 (test_profile.py:"),
        (raising(Mute()), "failed: Mute: (its message cannot be read) (test_profile.py:"),
    ],
)
def test_a_plugin_that_cannot_be_made_is_named_where_it_is_enabled(
    constructor: Callable[..., None], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        scheduler(profile(scorers=("random", "mine")), made_by(constructor))
    assert caught.value.path == "$.scheduler.plugins.Score.enabled[1]"
    assert caught.value.message.startswith(f"the constructor of `mine` {words}")


def test_a_constructor_that_the_user_interrupts_is_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt):
        scheduler(profile(scorers=("mine",)), made_by(raising(KeyboardInterrupt())))


class Unreadable(Section, frozen=True):
    when: Annotated[complex | bytes | list[int] | set[int], described("A type that YAML cannot have.")] = 1j


class Leaving(Section, frozen=True):
    def __post_init__(self) -> None:
        raise SystemExit(1)


@pytest.mark.parametrize(("args", "words"), [(Unreadable, "TypeError"), (Leaving, "SystemExit: 1")])
def test_arguments_that_cannot_be_read_are_the_plugins_fault(args: type[Section], words: str) -> None:
    given = [PluginArgs(name="mine", args={})]
    with pytest.raises(ConfigError) as caught:
        scheduler(profile(args=given), made_by(lambda self, args, services: None, args))
    assert caught.value.path == "$.scheduler.pluginConfig[0].args"
    assert caught.value.message.startswith(f"the `Args` of `mine` cannot be read: {words}")


class Raising:
    """An attribute that cannot be looked up."""

    def __get__(self, instance: object, owner: type) -> object:
        raise SystemExit(1)


def test_a_method_that_cannot_be_looked_up_is_missing() -> None:
    mine = made_by(lambda self, args, services: None)
    mine.filter = Raising()  # type: ignore[attr-defined]
    mine.post_schedule = Raising()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="`mine` cannot run at stage Filter; expected one of: bounded-load"):
        scheduler(profile(filters=("mine",)), mine)
    assert "mine" in scheduler(profile(scorers=("mine",)), mine).plugins
