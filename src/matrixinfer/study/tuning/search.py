"""The search: all profiles once, then the best one's numbers, then the finalists and the default on fresh seeds.

What looks best on one seed does so partly by chance. So the search uses seed 0 alone, and what is said about the winner
rests on the other seeds, where every finalist meets the same traffic as the default. Pure: times come from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from matrixinfer.scheduler.framework import Plugin
from matrixinfer.study.tuning.confidence import Difference, difference
from matrixinfer.study.tuning.space import Setting, changed, profiles, variants

Evaluate: TypeAlias = Callable[[Sequence[Setting], int], Sequence[float | None]]
"""Settings and a seed to a value for each, of which less is better; None for those that time did not suffice for."""

_FINALISTS = 3
_SEARCH_SHARE = 0.5
"""Part of the time after which the finalists are compared."""
_LEAST_GAIN = 0.002
"""A change must make a value smaller by this share to be kept."""
_FACTORS = (2.0, 2.0, 1.4, 1.4)


@dataclass(kw_only=True)
class Tried:
    """A setting, and what it reached by seed."""

    setting: Setting
    values: dict[int, float] = field(default_factory=dict)

    @property
    def searched(self) -> float:
        """Its value in the search; infinity if it has none."""
        return self.values.get(0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search has found."""

    default: Tried
    finalists: Sequence[tuple[Tried, Difference]]
    """With how they differ from the default; the best one first."""
    tried: Sequence[Tried]
    is_complete: bool
    """Whether all seeds were used, and the search was not cut short."""

    @property
    def best(self) -> tuple[Tried, Difference] | None:
        """The best setting, if it is shown to be better than the default."""
        return next((each for each in self.finalists if each[1].verdict == "better"), None)


class Search:
    """`left` gives the share of the time that is left, from 1 to 0; `stage` is told what is done now.

    `at_once`: how many settings `evaluate` gets together, if it can evaluate several at a time.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        plugins: Mapping[str, type[Plugin]],
        *,
        left: Callable[[], float],
        seeds: int,
        at_once: int = 1,
        stage: Callable[[str, int], None] = lambda _name, _count: None,
    ) -> None:
        self._evaluate = evaluate
        self._plugins = plugins
        self._left = left
        self._seeds = seeds
        self._at_once = at_once
        self._stage = stage
        self._tried: dict[str, Tried] = {}
        self._was_cut = False

    def run(self) -> Found:
        """Search, and compare what was found with the default."""
        shipped = profiles()
        self._stage("profiles", len(shipped))
        self._try(shipped)
        default = self._tried[shipped[0].name]
        best = self._best()
        for factor in _FACTORS:
            better = self._improved(best, factor)
            if better is best and factor == _FACTORS[-1]:
                break
            best = better
        return self._compared(default)

    def _best(self) -> Tried:
        return min(self._tried.values(), key=lambda each: each.searched)

    def _may_search(self) -> bool:
        may = self._left() > 1 - _SEARCH_SHARE
        self._was_cut = self._was_cut or not may
        return may

    def _try(self, settings: Sequence[Setting]) -> list[Tried]:
        """Evaluate settings that are new, on seed 0."""
        new = [each for each in settings if each.name not in self._tried]
        for setting, value in zip(new, self._evaluate(new, 0), strict=True):
            tried = self._tried[setting.name] = Tried(setting=setting)
            if value is None:
                self._was_cut = True
            else:
                tried.values[0] = value
        return [self._tried[each.name] for each in settings]

    def _improved(self, best: Tried, factor: float) -> Tried:
        """Change each number by itself, then all those together whose change was good."""
        around = list(variants(best.setting, self._plugins, factor=factor))
        if not around or not self._may_search():
            return best
        self._stage(f"numbers of {best.setting.profile}, by a factor of {factor:g}", len(around) + 1)
        good: dict[str, tuple[float, float]] = {}
        for start in range(0, len(around), self._at_once):
            some = around[start : start + self._at_once]
            if not self._may_search():
                break
            for (path, value, _), tried in zip(some, self._try([each[2] for each in some]), strict=True):
                reached = tried.searched
                if reached < best.searched * (1 - _LEAST_GAIN) and reached < good.get(path, (math.inf, 0.0))[0]:
                    good[path] = reached, value
        if len(good) > 1 and self._may_search():
            together = changed(best.setting, {path: value for path, (_, value) in good.items()}, self._plugins)
            if together is not None:
                self._try([together])
        return self._best()

    def _compared(self, default: Tried) -> Found:
        """Let the best ones, with the best of each other profile, meet the default on fresh seeds."""
        finalists = self._finalists(default)
        self._stage("finalists", self._seeds)
        field = [default, *finalists]
        for seed in range(1, self._seeds + 1):
            values = self._evaluate([each.setting for each in field], seed) if self._left() > 0 else [None]
            if None in values:
                self._was_cut = True
                break
            for tried, value in zip(field, values, strict=True):
                if value is not None:
                    tried.values[seed] = value
        compared = [(each, _against(each, default, len(finalists))) for each in finalists]
        return Found(
            default=default,
            finalists=sorted(compared, key=lambda each: each[1].mean),
            tried=list(self._tried.values()),
            is_complete=not self._was_cut,
        )

    def _finalists(self, default: Tried) -> list[Tried]:
        ranked = sorted(
            (each for each in self._tried.values() if each is not default),
            key=lambda each: (each.searched, len(each.setting.changes)),
        )
        ranked = [each for each in ranked if each.searched < math.inf]
        of_profile: dict[str, int] = {}
        reached = {default.searched}
        chosen: list[Tried] = []
        for each in ranked:
            profile = each.setting.profile
            if each.searched in reached or of_profile.get(profile, 0) > 1 or len(chosen) >= _FINALISTS:
                continue  # a change without any effect; or one profile would take all places
            of_profile[profile] = of_profile.get(profile, 0) + 1
            reached.add(each.searched)
            chosen.append(each)
        return chosen


def _against(tried: Tried, default: Tried, compared: int) -> Difference:
    seeds = [seed for seed in tried.values if seed and seed in default.values]
    return difference(
        [tried.values[seed] for seed in seeds], [default.values[seed] for seed in seeds], compared=compared
    )
