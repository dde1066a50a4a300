from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.access.quota import MAX_ACCOUNTS, NOTHING, Amounts, Ledger, is_limited, slice_at
from matrixinfer.config.access import QuotaConfig

WINDOW = 60.0
QUOTA = QuotaConfig(window_seconds=WINDOW, requests=10, input_tokens=100, uncached_tokens=50)


class Sent(NamedTuple):
    at: float
    amounts: Amounts


requests = st.lists(
    st.tuples(st.floats(0.0, 20.0), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60)),
    max_size=60,
)


@given(requests)
def test_no_window_wherever_it_begins_has_more_than_its_limit(steps: list[tuple[float, int, int, int, int]]) -> None:
    ledger, now, sent = Ledger(), 1000.0, list[Sent]()
    for pause, tokens, uncached, used, used_uncached in steps:
        now += pause
        taken = Amounts(requests=1, input_tokens=tokens, uncached_tokens=min(tokens, uncached))
        if ledger.reserve("a", QUOTA, taken, now).refused_by is not None:
            continue
        # An engine never reports more than was taken here: estimates are the next test's.
        real = taken._replace(input_tokens=min(used, tokens), uncached_tokens=min(used_uncached, taken.uncached_tokens))
        ledger.settle("a", slice_at(QUOTA, now), real.minus(taken))
        sent.append(Sent(now, real))
    for first in sent:
        inside = [each.amounts for each in sent if first.at <= each.at < first.at + WINDOW]
        total = Amounts(*map(sum, zip(NOTHING, *inside, strict=True)))
        assert total.requests <= 10
        assert total.input_tokens <= 100
        assert total.uncached_tokens <= 50


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 50)), min_size=1, max_size=40))
def test_who_waits_as_long_as_is_said_is_admitted(steps: list[tuple[float, int]]) -> None:
    ledger, now = Ledger(), 5000.0
    for pause, tokens in steps:
        now += pause
        verdict = ledger.reserve("a", QUOTA, Amounts(1, tokens, 0, tokens), now)
        if verdict.refused_by is not None:
            assert verdict.retry_after is not None
            assert verdict.retry_after <= WINDOW + WINDOW / 12
            now += verdict.retry_after + 1e-6
            assert ledger.reserve("a", QUOTA, Amounts(1, tokens, 0, tokens), now).refused_by is None
        ledger.settle("a", slice_at(QUOTA, now), NOTHING)


def test_a_request_that_is_too_large_alone_never_fits() -> None:
    verdict = Ledger().reserve("a", QUOTA, Amounts(1, 101, 0, 0), 0.0)
    assert (verdict.refused_by, verdict.retry_after) == ("input_tokens", None)


def test_more_than_was_taken_counts_and_less_is_given_back() -> None:
    ledger = Ledger()
    assert ledger.reserve("a", QUOTA, Amounts(1, 10, 0, 10), 0.0).refused_by is None
    ledger.settle("a", 0, Amounts(0, 80, 0, -10))
    verdict = ledger.reserve("a", QUOTA, Amounts(1, 20, 0, 20), 1.0)
    assert (verdict.refused_by, verdict.used) == ("input_tokens", Amounts(1, 90, 0, 0))
    assert ledger.reserve("a", QUOTA, Amounts(1, 10, 0, 10), 1.0).refused_by is None


def test_requests_at_the_same_time() -> None:
    ledger, quota = Ledger(), QuotaConfig(concurrent_requests=2)
    assert [ledger.reserve("a", quota, Amounts(1), 0.0).refused_by for _ in range(3)] == [
        None,
        None,
        "concurrent_requests",
    ]
    assert ledger.reserve("b", quota, Amounts(1), 0.0).refused_by is None
    ledger.settle("a", 0, NOTHING)
    assert ledger.reserve("a", quota, Amounts(1), 0.0).refused_by is None


def test_accounts_that_have_nothing_running_are_forgotten() -> None:
    ledger, quota = Ledger(), QuotaConfig(concurrent_requests=1)
    ledger.reserve("running", quota, Amounts(1), 0.0)
    for i in range(MAX_ACCOUNTS + 10):
        ledger.reserve(f"{i}", quota, Amounts(1), 0.0)
        ledger.settle(f"{i}", 0, NOTHING)
    assert len(ledger) == MAX_ACCOUNTS
    assert ledger.reserve("running", quota, Amounts(1), 0.0).refused_by == "concurrent_requests"


def test_nothing_is_limited_by_default() -> None:
    assert not is_limited(QuotaConfig())
    assert is_limited(QuotaConfig(concurrent_requests=1))
    assert is_limited(QuotaConfig(uncached_tokens=1))
