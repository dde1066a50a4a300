from __future__ import annotations

import json
from typing import Any

import pytest

from matrixinfer.access.callers import Caller
from matrixinfer.access.demand import Demand, Used
from matrixinfer.access.gate import CLIENT_GONE, MOST_OUTPUT_TOKENS, Gate, Place, Rules, Ticket
from matrixinfer.access.limits import Limits
from matrixinfer.access.quota import Amounts
from matrixinfer.access.salts import Salts
from matrixinfer.config.access import QuotaConfig
from matrixinfer.errors import Forbidden, LimitExceeded
from matrixinfer.telemetry.metrics import Metrics

QUOTA = QuotaConfig(requests=100, concurrent_requests=5, input_tokens=1000, output_tokens=1000, uncached_tokens=1000)
CALLER = Caller(name="a", tenant="lab", account="key:a", models=frozenset({"small"}), quota=QUOTA)
TAKEN = Amounts(requests=1, input_tokens=100, output_tokens=50, uncached_tokens=40)


def demand(tokens: int = 100, cached: int = 60, *, generates: bool = True, **body: Any) -> Demand:
    return Demand(tokens, cached, generates, json.dumps({"max_tokens": 50} | body).encode())


class Room:
    """One caller's limits."""

    def __init__(self) -> None:
        self.limits = Limits(now=lambda: 1000.0)
        self.metrics = Metrics()
        self.gate = Gate(Rules(limits=self.limits), self.metrics.access)

    async def ticket(self, **asked: Any) -> Ticket:
        ticket = self.gate.ticket(CALLER)
        await ticket.admit(demand(**asked))
        return ticket

    async def used(self) -> Amounts:
        """What counts now, by the headers of one more request, which is given back."""
        ticket = self.gate.ticket(CALLER)
        await ticket.admit(demand(tokens=0, cached=0, max_tokens=1))
        rest = [
            int(ticket.headers[f"x-ratelimit-remaining-{kind}"])
            for kind in ("requests", "input-tokens", "output-tokens", "uncached-tokens")
        ]
        ticket.close(503)
        return Amounts(99 - rest[0], 1000 - rest[1], 999 - rest[2], 1000 - rest[3])

    def refused(self, reason: str) -> float | None:
        return self.metrics.registry.get_sample_value("matrixinfer_access_refused_total", {"reason": reason})


async def test_what_a_request_may_use_is_taken_until_it_ends() -> None:
    room = Room()
    ticket = await room.ticket()
    assert await room.used() == TAKEN
    ticket.close(502)
    assert await room.used() == Amounts()


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        (Used(120, 80, 7), Amounts(1, 120, 7, 40)),
        (Used(120, None, 7), Amounts(1, 120, 7, 120)),
        (Used(120, 80, None), Amounts(1, 120, 0, 40)),  # nothing is generated, as for embeddings
    ],
)
async def test_what_the_engine_reports_counts_in_the_end(reported: Used, expected: Amounts) -> None:
    room = Room()
    ticket = await room.ticket()
    ticket.served()
    ticket.used(reported)
    ticket.close(200)
    assert await room.used() == expected
    sample = room.metrics.registry.get_sample_value
    assert sample("matrixinfer_tenant_tokens_total", {"tenant": "lab", "kind": "input"}) == 120
    assert sample("matrixinfer_tenant_tokens_total", {"tenant": "lab", "kind": "cached"}) == (
        reported.cached_tokens or 0
    )


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
async def test_what_failed_is_given_back(code: int) -> None:
    room = Room()
    (await room.ticket()).close(code)
    assert await room.used() == Amounts()


async def test_what_the_engine_refused_counts_as_a_request() -> None:
    room = Room()
    (await room.ticket()).close(400)
    assert await room.used() == Amounts(requests=1)


async def test_a_client_that_goes_away_pays_what_was_taken() -> None:
    room = Room()
    (await room.ticket()).close(CLIENT_GONE)
    assert await room.used() == TAKEN


async def test_an_answer_that_broke_off_is_given_back() -> None:
    room = Room()
    ticket = await room.ticket()
    ticket.served()
    ticket.close(502)
    assert await room.used() == Amounts()


async def test_an_answer_without_a_report_counts_what_was_taken() -> None:
    room = Room()
    ticket = await room.ticket()
    ticket.served()
    ticket.close(200)
    assert await room.used() == TAKEN


async def test_a_ticket_is_settled_once() -> None:
    room = Room()
    ticket = await room.ticket()
    for _ in range(3):
        ticket.close(400)
    assert await room.used() == Amounts(requests=1)
    room.gate.ticket(None).close(200)


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_output_tokens": 9}, 9),
        ({"max_tokens": 7, "n": 3}, 21),
        ({"max_tokens": None}, 512),
        ({"max_tokens": "many"}, 512),
        ({"max_tokens": 10**9}, 1000),
        ({"max_tokens": -5, "n": -5}, 1),
    ],
    ids=str,
)
async def test_the_answer_that_a_request_allows_is_taken(body: dict[str, Any], taken: int) -> None:
    room = Room()
    ticket = await room.ticket(**body)
    assert int(ticket.headers["x-ratelimit-remaining-output-tokens"]) == 1000 - taken


async def test_what_generates_nothing_takes_no_output_tokens() -> None:
    ticket = await Room().ticket(generates=False, max_tokens=None)
    assert ticket.headers["x-ratelimit-remaining-output-tokens"] == "1000"


async def test_refusals_say_why_and_when_to_come_again() -> None:
    room = Room()
    room.gate.ticket(CALLER).check_model("small")
    room.gate.ticket(None).check_model("large")
    with pytest.raises(Forbidden):
        room.gate.ticket(CALLER).check_model("large")
    with pytest.raises(LimitExceeded, match="this request asks for 1001") as caught:
        await room.ticket(tokens=1001)
    assert (caught.value.kind, caught.value.headers["x-should-retry"]) == ("tokens", "false")
    for _ in range(5):
        await room.ticket()
    with pytest.raises(LimitExceeded, match="5 requests at a time") as caught:
        await room.ticket()
    assert (caught.value.kind, caught.value.headers["retry-after"]) == ("requests", "1")
    assert [room.refused(reason) for reason in ("model", "limit_tokens", "limit_requests")] == [1, 1, 1]


async def test_a_limit_that_is_used_up_says_when_there_is_more() -> None:
    room = Room()
    ticket = await room.ticket(tokens=900, cached=900)
    ticket.used(Used(900, 900, 1))
    ticket.close(200)
    with pytest.raises(LimitExceeded, match="may use 1000 input tokens per 60 s, and has used 900") as caught:
        await room.ticket(tokens=200, cached=200)
    headers = caught.value.headers
    assert 60 <= int(headers["retry-after"]) <= 65
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("1000", "100")


def test_salts_need_a_tenant() -> None:
    salts = Salts("s" * 32)
    gate = Gate(Rules(salts=salts), Metrics().access)
    assert gate.ticket(CALLER).salt("mine") == salts.of("lab", "mine")
    assert (gate.ticket(None).isolates, gate.ticket(None).salt("mine")) == (False, "mine")


class Costs:
    """A queue that lets everybody through, and keeps what they said they cost."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    async def enter(self, tenant: str, cost: int) -> Place:
        self.seen.append(cost)
        return self

    @property
    def waited(self) -> bool:
        return False

    def leave(self, cost: int | None) -> None:
        pass


@pytest.mark.parametrize("asked", [{"max_tokens": 2**62}, {"max_tokens": 2**62, "n": 2**62}, {"max_tokens": 10**30}])
async def test_nobody_outweighs_all_others_in_the_queue_by_its_own_word(asked: dict[str, Any]) -> None:
    costs = Costs()
    gate = Gate(Rules(queue=costs), Metrics().access)
    ticket = gate.ticket(CALLER)
    await ticket.admit(demand(**asked))
    ticket.close(200)
    assert costs.seen[0] <= MOST_OUTPUT_TOKENS + 40
