from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.index.redis.circuit import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Circuit

FIRST, SECOND = FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


OPEN = ["failed", "failed"]
HALF_OPEN = [*OPEN, FIRST]
PROBING = [*HALF_OPEN, "admits"]


@pytest.mark.parametrize(
    ("steps", "state", "admits"),
    [
        ([], "closed", True),
        (["admits", "admits"], "closed", True),
        (["failed"], "closed", True),
        (["failed", "succeeded", "failed"], "closed", True),
        (["failed", "abandoned", "failed"], "open", False),
        (OPEN, "open", False),
        ([*OPEN, FIRST - 0.01], "open", False),
        ([*OPEN, "failed", "failed", FIRST], "half-open", True),  # late failures do not prolong the pause
        (HALF_OPEN, "half-open", True),
        (PROBING, "half-open", False),
        ([*PROBING, "abandoned"], "half-open", True),
        ([*PROBING, "succeeded"], "closed", True),
        ([*PROBING, "succeeded", "failed"], "closed", True),
        ([*PROBING, "failed"], "open", False),
        ([*PROBING, "failed", FIRST], "open", False),
        ([*PROBING, "failed", SECOND], "half-open", True),
        ([*PROBING, "failed", SECOND, "admits", "succeeded", *HALF_OPEN], "half-open", True),  # the first pause again
    ],
)
def test_states(steps: list[str | float], state: str, admits: bool) -> None:
    clock = Clock()
    circuit = Circuit(clock, failures=2)
    for step in steps:
        if isinstance(step, str):
            getattr(circuit, step)()
        else:
            clock.now += step
    assert circuit.state == state
    assert circuit.admits() is admits


@given(st.lists(st.booleans(), max_size=50))
def test_after_any_answers_the_server_is_asked_again_within_the_longest_pause(answers: list[bool]) -> None:
    clock = Clock()
    circuit = Circuit(clock, failures=3)
    for good in answers:
        if not circuit.admits():
            clock.now += LONGEST_PAUSE_SECONDS
            assert circuit.admits()
        (circuit.succeeded if good else circuit.failed)()
        assert circuit.state == "closed" if good else True
