"""Every registered plugin conforms; and the suite rejects plugins that do not."""

import random
from collections.abc import Sequence
from typing import ClassVar

import pytest
from hypothesis import Phase, settings

from matrixinfer.config import Section
from matrixinfer.scheduler.framework import Candidate, Plugin, SchedulingRequest, Scores, Services
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.testing import PluginConformance

REGISTRY = discover()


@pytest.fixture(params=sorted(REGISTRY))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestEveryPlugin(PluginConformance):
    @pytest.fixture(autouse=True)
    def plugin_of_the_test(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "plugin", REGISTRY[name], raising=False)

    def test_it_is_registered_under_its_name(self, name: str) -> None:
        assert self.plugin.name == name


class Plain(Plugin):
    """Scores nothing."""

    name: ClassVar[str] = "plain"

    class Args(Section, frozen=True):
        """None."""

    def __init__(self, args: Args, services: Services) -> None:
        self.services = services
        self.seen = 0

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        return Scores(values=[0.0] * len(candidates))


class TooHigh(Plain):
    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        return Scores(values=[float(pod.in_flight) for pod in candidates])


class TakesUnknownForANumber(Plain):
    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        return Scores(values=[0.0 if pod.running < 5 else 1.0 for pod in candidates])  # type: ignore[operator]


class Counts(Plain):
    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        self.seen += 1
        return Scores(values=[0.0] * len(candidates))


class DrawsElsewhere(Plain):
    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        return Scores(values=[random.random() for _ in candidates])


class NoStage(Plugin):
    """Does nothing."""

    name: ClassVar[str] = "no-stage"

    class Args(Section, frozen=True):
        """One that is not described."""

        limit: int = 1


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (TooHigh, "not between 0 and 100"),
        (TakesUnknownForANumber, "raised TypeError"),
        (Counts, "a dry run changed the plugin's state"),
        (DrawsElsewhere, "the dry runs after the first"),
        (NoStage, "expected a method `filter`, `score`, `pick` or `post_schedule`"),
    ],
)
def test_the_suite_says_what_a_broken_plugin_does(broken: type[Plugin], said: str) -> None:
    class Suite(PluginConformance):
        plugin = broken

        def _settings(self, share: float) -> settings:
            return settings(deadline=None, phases=[Phase.generate], database=None)

    with pytest.raises(AssertionError, match=said):
        Suite().run()


class WithoutArgs(Plugin):
    """Has no `Args`."""

    name: ClassVar[str] = "without-args"

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Scores:
        return Scores(values=[0.0] * len(candidates))


class Undocumented(Plain):
    pass


@pytest.mark.parametrize(
    ("of_the_suite", "said"),
    [
        ({}, "Suite.plugin: expected the class of your plugin"),
        ({"plugin": WithoutArgs}, "WithoutArgs.Args: expected a class derived from `matrixinfer.config.Section`"),
    ],
)
def test_every_test_says_what_a_suite_or_a_plugin_lacks(of_the_suite: dict[str, object], said: str) -> None:
    suite = type("Suite", (PluginConformance,), of_the_suite)()
    for name in dir(suite):
        if name.startswith("test_"):
            with pytest.raises(AssertionError, match=said):
                getattr(suite, name)()


def test_a_plugin_needs_a_docstring() -> None:
    suite = type("Suite", (PluginConformance,), {"plugin": Undocumented})()
    with pytest.raises(AssertionError, match="Undocumented: expected a docstring"):
        suite.test_it_has_a_name_a_stage_and_documented_arguments()


def test_a_plugin_that_conforms_passes_without_pytest() -> None:
    class Suite(PluginConformance):
        plugin = Plain
        max_examples = 5

    Suite().run()
