"""When endpoints are ejected, for how long, and how they come back."""

from __future__ import annotations

import pytest

from matrixinfer.config import OutliersConfig
from matrixinfer.pods.outliers import Outliers

PODS = ("a", "b", "c", "d")


class Watch:
    """Remembers what happened."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def ejected(self, name: str, reason: str, seconds: float) -> None:
        self.seen.append((name, seconds))

    def readmitted(self, name: str) -> None:
        self.seen.append((name, 0.0))


class Fleet:
    """Outliers with a clock that the test moves."""

    def __init__(self, **settings: float) -> None:
        self.now = 100.0
        self.watch = Watch()
        self.outliers = Outliers(OutliersConfig(**settings), lambda: self.now, self.watch)  # type: ignore[arg-type]

    def fail(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            self.outliers.failed(name, "500")

    def probe(self, name: str, *, succeeds: bool) -> None:
        assert self.outliers.started(name)
        if succeeds:
            self.outliers.succeeded(name, probe=True)
        else:
            self.outliers.failed(name, "500", probe=True)


def test_failures_in_a_row_eject_an_endpoint_and_no_other() -> None:
    fleet = Fleet()
    fleet.fail("a", 2)
    assert fleet.outliers.state("a") == "admitted"
    fleet.fail("a")
    assert fleet.outliers.state("a") == "ejected"
    assert fleet.outliers.withheld(PODS) == {"a": "ejected for 5.0 s more (3 failures in a row, the last: 500)"}


def test_a_success_ends_a_row_of_failures() -> None:
    fleet = Fleet(min_requests=1000)
    for _ in range(4):
        fleet.fail("a", 2)
        fleet.outliers.succeeded("a")
    assert fleet.outliers.state("a") == "admitted"


def test_a_share_of_failures_ejects_where_no_row_does() -> None:
    fleet = Fleet()
    for _ in range(5):
        fleet.outliers.succeeded("a")
        fleet.fail("a")
    assert fleet.outliers.state("a") == "admitted"  # the first success was before any failure: nine requests counted
    fleet.outliers.succeeded("a")
    fleet.fail("a")
    assert fleet.outliers.state("a") == "ejected"


def test_failures_before_the_window_do_not_count_towards_the_share() -> None:
    fleet = Fleet()
    for _ in range(4):
        fleet.fail("a")
        fleet.outliers.succeeded("a")
    fleet.now += 31
    for _ in range(4):
        fleet.fail("a")
        fleet.outliers.succeeded("a")
    assert fleet.outliers.state("a") == "admitted"


def test_one_probe_is_let_through_after_the_ejection_and_its_success_readmits() -> None:
    fleet = Fleet()
    fleet.fail("a", 3)
    fleet.now += 5
    assert fleet.outliers.state("a") == "half_open"
    assert fleet.outliers.withheld(PODS) == {}
    assert fleet.outliers.started("a")
    assert not fleet.outliers.started("a")
    assert fleet.outliers.withheld(PODS) == {"a": "half open: waiting for its probe"}
    fleet.outliers.succeeded("a", probe=True)
    assert fleet.outliers.state("a") == "admitted"
    assert fleet.watch.seen == [("a", 5.0), ("a", 0.0)]


def test_a_probe_without_outcome_lets_another_one_through() -> None:
    fleet = Fleet()
    fleet.fail("a", 3)
    fleet.now += 5
    assert fleet.outliers.started("a")
    fleet.outliers.abandoned("a")
    assert fleet.outliers.started("a")


def test_each_ejection_lasts_twice_as_long_up_to_the_bound() -> None:
    fleet = Fleet(eject_seconds=5.0, max_eject_seconds=30.0)
    fleet.fail("a", 3)
    for _ in range(4):
        fleet.now += fleet.watch.seen[-1][1]
        fleet.probe("a", succeeds=False)
    assert [seconds for _, seconds in fleet.watch.seen] == [5.0, 10.0, 20.0, 30.0, 30.0]


def test_good_behaviour_shortens_the_next_ejection() -> None:
    fleet = Fleet()
    fleet.fail("a", 3)
    fleet.now += 5
    fleet.probe("a", succeeds=False)
    fleet.now += 10
    fleet.probe("a", succeeds=True)
    fleet.now += 10  # as long as the last ejection
    fleet.fail("a", 3)
    assert fleet.watch.seen[-1] == ("a", 10.0)  # and not 20


def test_outcomes_of_requests_sent_before_the_ejection_change_nothing() -> None:
    fleet = Fleet()
    fleet.fail("a", 3)
    fleet.fail("a", 10)
    fleet.outliers.succeeded("a")
    assert fleet.outliers.state("a") == "ejected"
    assert fleet.watch.seen == [("a", 5.0)]


@pytest.mark.parametrize(("pods", "broken", "held"), [(1, 1, 0), (2, 2, 1), (3, 3, 2), (4, 4, 2), (4, 1, 1), (9, 9, 5)])
def test_no_more_than_the_share_is_withheld_and_one_always_remains(pods: int, broken: int, held: int) -> None:
    fleet = Fleet()
    names = [f"pod{i}" for i in range(pods)]
    for name in names[:broken]:
        fleet.now += 0.1
        fleet.fail(name, 3)
    withheld = fleet.outliers.withheld(names)
    assert len(withheld) == held
    assert list(withheld) == names[:broken][::-1][:held]  # those with the longest time to go


def test_a_busy_endpoint_is_left_alone_for_as_long_as_it_asks_and_is_not_ejected() -> None:
    fleet = Fleet()
    for _ in range(20):
        fleet.outliers.busy("a", retry_after=7.0)
    assert fleet.outliers.state("a") == "busy"
    assert fleet.outliers.withheld(PODS) == {"a": "busy, for 7.0 s more"}
    fleet.now += 7
    assert fleet.outliers.state("a") == "admitted"
    assert fleet.watch.seen == []


def test_without_a_retry_after_the_pause_grows_with_each_busy_answer() -> None:
    fleet = Fleet()
    pauses = []
    for _ in range(7):
        fleet.outliers.busy("a", retry_after=None)
        pauses.append(fleet.outliers.withheld(PODS)["a"])
    assert pauses[0] == "busy, for 1.0 s more"
    assert pauses[2] == "busy, for 4.0 s more"
    assert pauses[-1] == "busy, for 30.0 s more"
    fleet.now += 30
    fleet.outliers.succeeded("a")
    fleet.outliers.busy("a", retry_after=None)
    assert fleet.outliers.withheld(PODS)["a"] == "busy, for 1.0 s more"


def test_a_long_retry_after_is_honoured_up_to_the_bound() -> None:
    fleet = Fleet()
    fleet.outliers.busy("a", retry_after=86_400.0)
    assert fleet.outliers.withheld(PODS)["a"] == "busy, for 30.0 s more"


def test_a_probe_that_finds_the_endpoint_busy_readmits_it() -> None:
    fleet = Fleet()
    fleet.fail("a", 3)
    fleet.now += 5
    assert fleet.outliers.started("a")
    fleet.outliers.busy("a", retry_after=2.0, probe=True)
    assert fleet.outliers.state("a") == "busy"


def test_when_all_are_busy_one_remains() -> None:
    fleet = Fleet()
    for seconds, name in enumerate(PODS, start=1):
        fleet.outliers.busy(name, retry_after=float(seconds))
    assert set(fleet.outliers.withheld(PODS)) == {"b", "c", "d"}


def test_nothing_is_remembered_of_endpoints_that_behave_or_have_gone() -> None:
    fleet = Fleet()
    for name in PODS:
        fleet.outliers.succeeded(name)
    assert len(fleet.outliers) == 0
    fleet.fail("a", 3)
    fleet.outliers.forget("a")
    fleet.fail("b")
    fleet.now += 31
    fleet.outliers.succeeded("b")
    assert len(fleet.outliers) == 0


def test_a_share_of_zero_turns_ejection_off() -> None:
    fleet = Fleet(max_ejected_share=0.0)
    fleet.fail("a", 50)
    assert fleet.outliers.withheld(PODS) == {}


def test_a_probe_that_takes_long_does_not_keep_the_endpoint_out() -> None:
    fleet = Fleet()
    fleet.fail("a", 3)
    fleet.now += 5.0
    assert fleet.outliers.started("a")
    fleet.now += 4.9
    assert not fleet.outliers.started("a")
    assert "waiting for its probe" in fleet.outliers.withheld(PODS)["a"]
    fleet.now += 0.2
    assert fleet.outliers.withheld(PODS) == {}
    fleet.probe("a", succeeds=True)
    assert fleet.outliers.state("a") == "admitted"


def test_what_another_gateway_has_ejected_gets_no_requests_while_it_says_so() -> None:
    now = 0.0
    outliers = Outliers(OutliersConfig(), lambda: now)
    outliers.reported("other", ["a"], seconds=3.0)
    assert outliers.withheld(["a", "b"]) == {"a": "ejected by another gateway"}
    assert outliers.reason("a") == "ejected by another gateway"
    assert outliers.ejected() == []  # it is not passed on as if it were ours
    outliers.reported("other", [], seconds=3.0)
    assert outliers.withheld(["a", "b"]) == {}
    outliers.reported("other", ["a"], seconds=3.0)
    now = 3.1
    assert outliers.withheld(["a", "b"]) == {}  # it has not been heard of since
    assert outliers.reason("a") is None


def test_what_others_have_ejected_counts_for_the_largest_share() -> None:
    outliers = Outliers(OutliersConfig(), lambda: 0.0)
    outliers.reported("one", ["a", "b"], seconds=3.0)
    outliers.reported("two", ["c", "d"], seconds=3.0)
    assert len(outliers.withheld(["a", "b", "c", "d"])) == 2


def test_an_endpoint_that_nobody_probes_is_readmitted_and_the_next_ejection_is_longer() -> None:
    fleet = Fleet()
    fleet.fail("a", 3)
    fleet.now += 9.9  # ejected for 5 s, and no request has suited it for almost as long
    assert fleet.outliers.state("a") == "half_open"
    assert fleet.outliers.ejected() == ["a"]
    fleet.now += 0.1
    assert fleet.outliers.ejected() == []
    assert fleet.outliers.state("a") == "admitted"
    assert fleet.outliers.reason("a") is None
    fleet.fail("a", 3)
    assert fleet.watch.seen[-1] == ("a", 10.0)


def test_own_ejections_are_reported_until_the_probe_succeeds() -> None:
    now = 0.0
    outliers = Outliers(OutliersConfig(consecutive_failures=1, eject_seconds=100.0), lambda: now)
    outliers.failed("a", "broke")
    assert outliers.ejected() == ["a"]
    now = 100.0
    assert outliers.ejected() == ["a"]
    assert outliers.started("a")
    outliers.succeeded("a", probe=True)
    assert outliers.ejected() == []
