"""What the access log says about a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from matrixinfer.config import AccessLogConfig
from matrixinfer.gateway.access_log import RequestLog
from matrixinfer.gateway.answer import Exchange
from matrixinfer.scheduler.framework import Candidate
from matrixinfer.telemetry.access_entry import AccessEntry
from matrixinfer.telemetry.access_log import AccessLog


class Kept(AccessLog):
    """Keeps what it is given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(AccessLogConfig(path="-", **settings))
        self.entries: list[AccessEntry] = []

    def add(self, entry: AccessEntry) -> None:
        self.entries.append(entry)


def exchange(
    chain: tuple[int, ...] = (),
    *,
    matched: int | None = 1,
    computed: bool = True,
    tokens: int | None = 300,
    late: dict[str, int] | None = None,
    has_begun: bool = False,
) -> Exchange:
    """One that was sent to a second pod."""
    request = SimpleNamespace(model="m", prompt_tokens=tokens, block_size=128, chain=chain)
    record = SimpleNamespace(attempts=["a", "b"], timings_ms={"parse": 0.12345}, counted=None, cached=None, late=late)
    in_flight = SimpleNamespace(
        record=record,
        request=request,
        decision=SimpleNamespace(request=request),
        pod=Candidate(name="b", url="", matched_blocks=matched, engine_block=128),
        prepared=SimpleNamespace(degraded={}),
        computed=computed,
    )
    values = {"in_flight": in_flight, "first_byte_at": 2.0, "started": 1.0, "output_tokens": 7, "stream_events": 0}
    return cast("Exchange", SimpleNamespace(**values, has_begun=has_begun))


def logged(
    sent: Exchange | None, *, code: int = 200, error: str | None = None, is_chained: bool = True, **settings: Any
) -> AccessEntry | None:
    sink = Kept(**settings)
    RequestLog(sink, is_chained=is_chained).ended(
        identity="r", path="/v1/x", session="s", code=code, error=error, started=1.0, body_read=1.5, exchange=sent
    )
    return sink.entries[0] if sink.entries else None


def test_an_entry_has_what_is_known_of_a_request() -> None:
    found = logged(exchange((1, 2)))
    assert found is not None
    assert (found.model, found.pod, found.tried, found.prompt_tokens, found.output_tokens) == ("m", "b", ["a"], 300, 7)
    assert found.predicted_hit_tokens == 128
    assert found.session not in (None, "s")
    assert (found.ms["body"], found.ms["parse"], found.ms["first_byte"]) == (500.0, 0.123, 1000.0)
    assert (found.block_size, list(found.blocks)) == (128, [1, 2])


@pytest.mark.parametrize(
    ("sent", "predicted"),
    [
        (exchange(matched=0), 0),
        (exchange(matched=None), None),
        (exchange(tokens=None), None),
        (exchange(late={"predicted_hit_tokens": 5}), 5),
    ],
)
def test_a_hit_that_nobody_predicted_is_unknown_and_not_zero(sent: Exchange, predicted: int | None) -> None:
    found = logged(sent)
    assert found is not None
    assert found.predicted_hit_tokens == predicted


@pytest.mark.parametrize(
    ("code", "error", "sent", "outcome"),
    [
        (200, None, exchange(), "answered"),
        (429, None, exchange(), "refused"),
        (400, "invalid_request", None, "refused"),
        (502, "pod_unreachable", exchange(), "refused"),
        (502, "pod_unreachable", exchange(has_begun=True), "broken_off"),
        (499, None, exchange(has_begun=True), "client_left"),
    ],
)
def test_the_outcome_says_who_ended_the_request(
    code: int, error: str | None, sent: Exchange | None, outcome: str
) -> None:
    found = logged(sent, code=code, error=error, sample=0.0)
    if outcome == "answered":
        assert found is None  # not in the sample
        return
    assert found is not None
    assert (found.outcome, found.status, found.error, found.sampled) == (outcome, code, error, False)


def test_blocks_are_those_of_computed_prompts_up_to_a_bound() -> None:
    for sent, settings, blocks in (
        (exchange((1, 2, 3), computed=False), {}, []),
        (exchange((1, 2, 3)), {"blocks": False}, []),
        (exchange((1, 2, 3)), {"max_blocks": 2}, [1, 2]),
        (exchange((1 << 63, 2)), {}, [0, 2]),
    ):
        found = logged(sent, **settings)
        assert found is not None
        assert list(found.blocks) == blocks


def test_hashes_that_stand_for_one_block_alone_are_chained() -> None:
    first, other = logged(exchange((1, 2)), is_chained=False), logged(exchange((3, 2)), is_chained=False)
    again = logged(exchange((1, 2, 9)), is_chained=False)
    assert first is not None
    assert other is not None
    assert again is not None
    assert first.blocks[1] != other.blocks[1]
    assert list(again.blocks[:2]) == list(first.blocks)
    assert max(*again.blocks, *other.blocks) < 1 << 53
