from __future__ import annotations

from matrixinfer.config import PodConfig
from matrixinfer.pods.pod import Endpoint, Pod
from matrixinfer.pods.slow_start import held_back


def endpoint(name: str, up_since: float | None) -> Endpoint:
    pod = Pod(config=PodConfig(name=name, url=f"http://{name}"), up_since=up_since)
    return Endpoint(name=name, pod=pod, rank=None)


def held(
    counts: dict[str, int], *, new: dict[str, float], now: float = 100.0, withheld: tuple[str, ...] = ()
) -> set[str]:
    endpoints = [endpoint(name, new.get(name, 0.0)) for name in counts]
    return set(held_back(endpoints, counts.__getitem__, now=now, seconds=30.0, withheld=withheld))


def test_a_new_pod_gets_one_request_at_a_time_beside_idle_ones() -> None:
    assert held({"old": 0, "new": 0}, new={"new": 99.0}) == set()
    assert held({"old": 0, "new": 1}, new={"new": 99.0}) == {"new"}


def test_its_share_grows_with_its_age() -> None:
    most = []
    for age in (0, 3, 15, 27, 29):
        admitted = [n for n in range(30) if not held({"a": 20, "b": 20, "new": n}, new={"new": 100.0 - age})]
        most.append(max(admitted) + 1)
    assert most == [2, 2, 10, 18, 20]


def test_after_the_time_nothing_holds_it_back() -> None:
    assert held({"old": 1, "new": 50}, new={"new": 69.0}) == set()


def test_pods_that_all_came_up_just_now_hold_nobody_back() -> None:
    assert held({"a": 9, "b": 3}, new={"a": 99.0, "b": 98.0}) == set()


def test_a_pod_that_is_withheld_is_no_measure_for_others() -> None:
    assert held({"old": 0, "new": 9}, new={"new": 99.0}, withheld=("old",)) == set()


def test_a_pod_that_never_answered_is_not_new() -> None:
    assert held_back([endpoint("a", None), endpoint("b", None)], lambda _: 5, now=1.0, seconds=30.0) == {}


def test_the_reason_says_what_is_known() -> None:
    counts = {"old": 20, "new": 4}
    endpoints = [endpoint("old", 0.0), endpoint("new", 94.0)]
    assert held_back(endpoints, counts.__getitem__, now=100.0, seconds=30.0) == {
        "new": "came up 6 s ago and has 4 in flight, its share is 4"
    }
