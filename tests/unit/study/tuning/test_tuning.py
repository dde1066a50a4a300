"""The search for the best settings: what it tries, what it claims, and when it ends."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from matrixinfer.app.router_setup import build_scheduler
from matrixinfer.cli import main
from matrixinfer.config import PluginRef, PluginsConfig, SchedulerConfig, load, parse
from matrixinfer.scheduler.plugin_loader import discover
from matrixinfer.scheduler.policies import POLICIES
from matrixinfer.study.engine import EngineShape
from matrixinfer.study.fleet import Fleet
from matrixinfer.study.generators import generate
from matrixinfer.study.presets import preset
from matrixinfer.study.tuning.confidence import difference, quantile
from matrixinfer.study.tuning.output import configuration, document, sentence
from matrixinfer.study.tuning.runs import Runs, Traffic, fitting
from matrixinfer.study.tuning.search import Found, Search
from matrixinfer.study.tuning.space import Setting, changed, numbers, profiles, variants

PLUGINS = discover()
TEXT = "multi-round:sessions=12,turns=3"


@pytest.mark.parametrize(
    ("share", "freedom", "expected"), [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.975, 9, 2.262), (0.995, 7, 3.499)]
)
def test_the_quantiles_are_students(share: float, freedom: int, expected: float) -> None:
    assert quantile(share, freedom) == pytest.approx(expected, abs=0.001)


def test_a_difference_is_claimed_only_where_the_seeds_show_it() -> None:
    defaults = [1.0, 2.0, 3.0, 1.5]
    assert difference([0.8, 1.6, 2.41, 1.2], defaults).verdict == "better"
    assert difference([1.3, 2.5, 3.9, 1.9], defaults).verdict == "worse"
    assert difference([0.8, 2.4, 2.5, 1.6], defaults).verdict == "no difference shown"
    assert difference(defaults, defaults).verdict == "no difference shown"
    assert difference([0.5, 1.0], [1.0, 2.0]).verdict == "no difference shown"
    alone, among = (difference([0.9, 1.7, 2.9, 1.3], defaults, compared=count) for count in (1, 3))
    assert among.low < alone.low < alone.mean < alone.high < among.high


def test_chance_alone_is_rarely_called_a_difference() -> None:
    draw = random.Random(1)
    wrong = 0
    for _ in range(400):
        values, defaults = ([math.exp(draw.gauss(0, 0.1)) for _ in range(6)] for _ in range(2))
        wrong += difference(values, defaults).verdict != "no difference shown"
    assert wrong < 40


def test_a_second_name_for_a_profile_is_not_tried() -> None:
    configs = [each.config for each in profiles()]
    assert all(one != other for number, one in enumerate(configs) for other in configs[:number])
    assert profiles()[0].profile == "kv_aware"


def test_every_number_of_a_profile_is_changed_within_its_bounds() -> None:
    for setting in profiles():
        known = numbers(setting.config, PLUGINS)
        tried = list(variants(setting, PLUGINS, factor=2.0))
        assert {path for path, _, _ in tried} == set(known)
        for path, value, new in tried:
            build_scheduler(new.config)
            assert numbers(new.config, PLUGINS)[path] == value != known[path]
    plain = next(each for each in profiles() if each.profile == "cache_aware")
    assert changed(plain, {"bounded-load.factor": 0.5}, PLUGINS) is None


class Pretended:
    """A fleet whose value is a formula of the settings, with noise that all settings of a seed share."""

    def __init__(self, *, budget: float = math.inf) -> None:
        self.left = 1.0
        self.cost = 1.0 / budget
        self.asked: list[tuple[str, int]] = []

    def __call__(self, settings: Sequence[Setting], seed: int) -> list[float | None]:
        values: list[float | None] = []
        for setting in settings:
            self.asked.append((setting.name, seed))
            self.left -= self.cost
            values.append(self.value(setting) * random.Random(seed).uniform(0.5, 2) if self.left > 0 else None)
        return values

    def value(self, setting: Setting) -> float:
        base = {"kv_aware": 1.0, "cache_aware": 0.9}.get(setting.profile, 1.5)
        known = numbers(setting.config, PLUGINS)
        off = abs(math.log2(known.get("least-request.weight", 1.0) / 2))
        return base * (1 + 0.1 * off) if setting.profile == "cache_aware" else base

    def search(self, seeds: int = 5, at_once: int = 1) -> Found:
        return Search(self, PLUGINS, left=lambda: max(0.0, self.left), seeds=seeds, at_once=at_once).run()


def test_the_best_profile_is_found_and_its_numbers_after_it() -> None:
    fleet = Pretended()
    found = fleet.search()
    assert found.best is not None
    tried, gain = found.best
    assert tried.setting.profile == "cache_aware"
    assert dict(tried.setting.changes) == {"least-request.weight": 2}
    assert gain.mean == pytest.approx(-0.1)
    assert found.is_complete
    assert {seed for _, seed in fleet.asked} == set(range(6))
    assert {name for name, _ in fleet.asked} >= {each.name for each in profiles()}


def test_several_at_once_find_the_same() -> None:
    one, four = Pretended().search(), Pretended().search(at_once=4)
    assert [each.setting.name for each in one.tried] == [each.setting.name for each in four.tried]
    assert one.finalists == four.finalists


def test_changes_without_effect_take_no_place_among_the_finalists() -> None:
    found = Pretended().search()
    assert len({each.searched for each, _ in found.finalists}) == len(found.finalists) == 3


def test_where_nothing_is_better_the_default_is_kept() -> None:
    class Flat(Pretended):
        def value(self, setting: Setting) -> float:
            return 1.0 if setting.profile == "kv_aware" and not setting.changes else 1.2

    found = Flat().search()
    assert found.best is None
    assert sentence(found, "ttft_mean_s").startswith("Keep the default profile, kv_aware")
    assert document(found, goal="ttft_mean_s", traces=[])["best"] is None


@pytest.mark.parametrize("budget", [3, 12, 30])
def test_a_search_that_runs_out_of_time_says_so_and_claims_only_what_it_saw(budget: int) -> None:
    fleet = Pretended(budget=budget)
    found = fleet.search(seeds=20)
    assert not found.is_complete
    assert len(fleet.asked) <= budget + len(POLICIES)
    assert all(gain.seeds < 20 for _, gain in found.finalists)
    build_scheduler(load_text(configuration(found, goal="hit_rate", traces=["a"])))


def load_text(text: str) -> SchedulerConfig:
    return parse(text, base=Path()).scheduler


def test_what_is_written_is_a_configuration_with_the_same_scheduler() -> None:
    found = Pretended().search()
    assert found.best is not None
    wanted = found.best[0].setting.config
    written = load_text(configuration(found, goal="ttft_mean_s", traces=["a", "b"]))
    build_scheduler(written)
    assert written.plugins == wanted.plugins
    assert {each.name: each.args for each in written.plugin_config} == {
        each.name: each.args for each in wanted.plugin_config
    }
    assert PluginRef(name="least-request", weight=2.0) in written.plugins.score.enabled


def traffic(text: str = TEXT) -> Traffic:
    trace = generate(text, seed=0)
    shape: EngineShape = preset("llama-8b-h100").shape(trace.block_size)
    return Traffic(trace=trace, fleet=Fleet(shape=shape, pods=2, pod_tokens=40_000), generator=text)


def test_seeds_draw_generated_traffic_again_and_move_the_sessions_of_recorded_traffic() -> None:
    drawn = traffic()
    recorded = Traffic(trace=drawn.trace, fleet=drawn.fleet)
    assert drawn.with_seed(0) is drawn
    assert drawn.with_seed(1).trace.turns != drawn.trace.turns
    moved = recorded.with_seed(1).trace.turns
    assert [turn.letters for turn in moved] == [turn.letters for turn in drawn.trace.turns]
    starts = [turn.delay for turn in moved if turn.after is None]
    assert starts != [turn.delay for turn in drawn.trace.turns if turn.after is None]
    assert min(starts) >= 0
    assert moved == recorded.with_seed(1).trace.turns != recorded.with_seed(2).trace.turns


@pytest.mark.parametrize("goal", ["ttft_mean_s", "hit_rate"])
def test_runs_give_smaller_values_to_better_settings_and_none_after_the_end(goal: str) -> None:
    settings = {each.profile: each for each in profiles()}
    wanted = [settings["kv_aware"], settings["random"]]
    with Runs([traffic()], goal, ends_at=time.monotonic() + 600) as runs:
        aware, random_one = runs(wanted, 0)
        assert aware is not None
        assert random_one is not None
        assert aware < random_one
        assert runs(wanted, 0) == [aware, random_one]
    with Runs([traffic()], goal, ends_at=time.monotonic() + 600, jobs=2) as runs:
        assert runs(wanted, 0) == [aware, random_one]
    with Runs([traffic()], goal, ends_at=time.monotonic() - 1) as runs:
        assert runs(wanted, 1) == [None, None]


def test_a_trace_that_is_too_long_for_the_time_is_cut() -> None:
    long = traffic("multi-round:sessions=400,turns=3")
    (cut,) = fitting([long], seconds=0.4)
    assert 200 <= len(cut.trace.turns) < len(long.trace.turns)
    short = traffic()
    assert fitting([short], seconds=1e6) == [short]


def test_the_command_writes_what_serve_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tuned.yaml"
    arguments = ["tune", TEXT, "--pods", "2", "--kv-tokens-per-pod", "20000", "--minutes", "0.2", "--seeds", "3"]
    assert main([*arguments, "--output", str(file), "--json"]) == 0
    said = msgspec.json.decode(capsys.readouterr().out)
    assert said["traces"] == [{"name": TEXT, "requests": said["traces"][0]["requests"], "of": 36}]
    assert said["advice"] in file.read_text()
    build_scheduler(load(file).scheduler)
    assert msgspec.convert(said["scheduler"]["plugins"], PluginsConfig) == load(file).scheduler.plugins


def test_a_folder_that_is_missing_is_an_error_before_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", TEXT, "--output", "/no/such/folder/x.yaml"]) == 2
    assert "--output: there is no folder" in capsys.readouterr().err
