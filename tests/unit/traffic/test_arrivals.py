from __future__ import annotations

import pytest

from matrixinfer.traffic.arrivals import LATELY_SECONDS, TOGETHER_SECONDS, Arrivals


def test_requests_one_after_the_other_are_not_together() -> None:
    arrivals = Arrivals()
    for n in range(200):
        arrivals.sent(1_000.0, n * 1.1 * LATELY_SECONDS)
    assert arrivals.work == pytest.approx(1_000.0, rel=0.01)
    assert (arrivals.together, arrivals.lately) == (0.0, 0.0)


def test_bursts_are_learnt_even_if_they_are_rare() -> None:
    arrivals = Arrivals()
    for n in range(200):
        for _ in range(3):
            arrivals.sent(500.0, n * 60.0)
    assert arrivals.together == pytest.approx(1.0, abs=0.1)  # the mean of 0, 1 and 2
    assert arrivals.lately == arrivals.together


def test_steady_traffic_comes_together_by_its_rate() -> None:
    arrivals, per_second = Arrivals(), 40
    for n in range(500):
        arrivals.sent(0.0, n / per_second)
    assert arrivals.together == pytest.approx(TOGETHER_SECONDS * per_second, abs=1.0)
    assert arrivals.lately == pytest.approx(LATELY_SECONDS * per_second, abs=1.0)
    for n in range(500):
        arrivals.sent(0.0, 500 / per_second + n / 10_000)
    assert arrivals.lately == pytest.approx(64.0, abs=1.0)  # no more are kept
