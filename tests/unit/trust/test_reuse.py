from __future__ import annotations

import pytest

from matrixinfer.trust.reuse import GRACE_SECONDS, HALF_LIFE_SECONDS, LEAST, SHORT_AFTER, Reuse


def test_answers_that_agree_change_nothing() -> None:
    reuse = Reuse()
    for found in (64, 80, 64):
        reuse.observe(64, found, 1.0)
    reuse.observe(0, 0, 1.0)  # nothing was predicted
    assert (reuse.share(1.0), reuse.is_short) == (1.0, False)


def short() -> Reuse:
    """An endpoint that is known to reuse less than predicted, and now gets full credit again."""
    reuse = Reuse()
    for _ in range(SHORT_AFTER):
        reuse.observe(1, 0, 0.0)
    reuse.start_over()
    assert reuse.is_short
    return reuse


def test_nothing_is_taken_off_until_the_events_are_known_to_say_too_much() -> None:
    reuse = Reuse()
    for _ in range(SHORT_AFTER - 1):
        reuse.observe(64, 0, 0.0)
        assert reuse.share(0.0) == 1.0
    reuse.observe(64, 0, 0.0)
    assert reuse.share(0.0) < 0.5


def test_one_answer_weighs_little() -> None:
    reuse = short()
    reuse.observe(64, 0, 0.0)
    assert reuse.share(0.0) == pytest.approx(0.8)


def test_a_small_prediction_says_little_about_large_ones() -> None:
    reuse = short()
    for _ in range(10):
        reuse.observe(10_000, 10_000, 0.0)
    assert reuse.is_short
    reuse.observe(16, 0, 0.0)
    assert reuse.share(0.0) == 1.0
    reuse.observe(100_000, 0, 0.0)
    assert reuse.share(0.0) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("found", "share"), [(48, 0.75), (16, 0.25), (0, LEAST)])
def test_the_share_tends_to_what_answers_report(found: int, share: float) -> None:
    reuse = Reuse()
    for _ in range(40):
        reuse.observe(64, found, 0.0)
    assert reuse.share(0.0) == pytest.approx(share, abs=0.01)


def test_a_shortfall_fades_with_time() -> None:
    reuse = Reuse()
    for _ in range(40):
        reuse.observe(64, 32, 0.0)
    assert reuse.share(GRACE_SECONDS) == pytest.approx(0.5, abs=0.01)
    assert reuse.share(GRACE_SECONDS + HALF_LIFE_SECONDS) == pytest.approx(0.75, abs=0.01)
    assert reuse.share(10 * HALF_LIFE_SECONDS) == 1.0
    reuse.observe(64, 64, 10 * HALF_LIFE_SECONDS)
    assert reuse.share(10 * HALF_LIFE_SECONDS) == 1.0


def test_less_again_and_again_is_a_trait_until_as_many_agree() -> None:
    reuse = Reuse()
    for _ in range(SHORT_AFTER - 1):
        reuse.observe(64, 32, 0.0)
    assert not reuse.is_short
    reuse.observe(64, 32, 0.0)
    assert reuse.is_short
    for _ in range(2 * SHORT_AFTER - 1):
        reuse.observe(64, 64, 0.0)
    assert reuse.is_short
    reuse.observe(64, 64, 0.0)
    assert not reuse.is_short
