from __future__ import annotations

import pytest

from matrixinfer.traffic.speed import HALF_LIFE_SECONDS, LEAST_RATE, MOST_RATE, USUAL_RATE, Speeds


def test_before_any_sample_every_pod_has_the_usual_rate() -> None:
    assert Speeds().new().rate(0.0) == pytest.approx(USUAL_RATE)


def test_the_first_samples_count_in_full_however_far_from_the_usual_rate() -> None:
    speed = Speeds().new()
    speed.observe(1_000, 2.0, 0.0)
    assert speed.rate(0.0) == pytest.approx(500)


def test_a_new_pod_is_taken_to_be_like_the_fleet() -> None:
    fleet = Speeds()
    known = fleet.new()
    for _ in range(10):
        known.observe(1_000, 2.0, 0.0)
    fresh = fleet.new()
    assert fresh.rate(0.0) == pytest.approx(500)
    fresh.observe(1_000, 200.0, 0.0)  # a first answer that is late for another reason
    assert fresh.rate(0.0) > 100


@pytest.mark.parametrize("seconds", [1e-6, 1e4])
def test_one_outlier_moves_the_estimate_by_a_tenth(seconds: float) -> None:
    speed = Speeds().new()
    for _ in range(50):
        speed.observe(1_000, 1.0, 0.0)
    speed.observe(1_000, seconds, 0.0)
    assert 900 < speed.rate(0.0) < 1_110


def test_a_lasting_change_is_learnt() -> None:
    speed = Speeds().new()
    for _ in range(50):
        speed.observe(1_000, 1.0, 0.0)
    for _ in range(40):
        speed.observe(1_000, 10.0, 0.0)
    assert speed.rate(0.0) == pytest.approx(100, rel=0.3)


def test_small_prompts_show_the_overhead_and_not_the_rate() -> None:
    speed = Speeds().new()
    for _ in range(50):
        speed.observe(10, 0.2, 0.0)
    assert speed.samples == 0
    assert speed.rate(0.0) == pytest.approx(USUAL_RATE)
    speed.observe(1_000, 1.2, 0.0)
    assert speed.rate(0.0) == pytest.approx(1_000, rel=0.1)


def test_whole_answers_only_show_that_a_pod_is_faster() -> None:
    speed = Speeds().new()
    speed.observe(1_000, 1.0, 0.0, is_whole=True)
    assert speed.samples == 0
    speed.observe(20_000, 1.0, 0.0, is_whole=True)
    assert speed.rate(0.0) == pytest.approx(20_000)


def test_a_pod_without_requests_becomes_like_the_fleet_again() -> None:
    fleet = Speeds()
    usual, slow = fleet.new(), fleet.new()
    for _ in range(200):
        usual.observe(8_000, 1.0, 0.0)
    for _ in range(5):
        slow.observe(1_000, 10.0, 0.0)
    before = slow.rate(0.0)
    assert before < 4_000
    assert before < slow.rate(HALF_LIFE_SECONDS) < usual.rate(HALF_LIFE_SECONDS)
    assert slow.rate(10 * HALF_LIFE_SECONDS) > 0.95 * usual.rate(10 * HALF_LIFE_SECONDS)


def test_rates_are_bounded() -> None:
    for seconds, rate in ((1e-9, MOST_RATE), (1e9, LEAST_RATE)):
        speed = Speeds().new()
        speed.observe(1_000, seconds, 0.0)
        assert speed.rate(0.0) == pytest.approx(rate)
    speed = Speeds().new()
    speed.observe(1_000, 0.0, 0.0)
    assert speed.samples == 0


def test_small_differences_between_pods_are_noise() -> None:
    fleet = Speeds()
    pods = [fleet.new() for _ in range(3)]
    for _ in range(100):
        for pod, seconds in zip(pods, (1.0, 1.1, 3.0), strict=True):
            pod.observe(8_000, seconds, 0.0)
    first, second, slow = (pod.rate(0.0) for pod in pods)
    assert first == pytest.approx(second, rel=0.35)
    assert slow < 0.6 * second
    near = Speeds()
    pods = [near.new() for _ in range(2)]
    for _ in range(100):
        for pod, seconds in zip(pods, (1.0, 1.1), strict=True):
            pod.observe(8_000, seconds, 0.0)
    assert pods[0].rate(0.0) == pods[1].rate(0.0)
