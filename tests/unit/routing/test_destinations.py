"""Which pods a request may go to."""

from __future__ import annotations

import pytest

from matrixinfer.access.callers import Caller
from matrixinfer.access.gate import Gate, Rules
from matrixinfer.config import ModelConfig, PodConfig, PodWatchConfig
from matrixinfer.errors import Forbidden, Overloaded, UnknownResponse
from matrixinfer.pods.pod import ServedNames
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.opaque import opaque
from matrixinfer.prompt.requests import parse
from matrixinfer.routing.destinations import Destinations
from matrixinfer.routing.stored_responses import FindResponse, StoredResponses
from matrixinfer.telemetry.metrics import Metrics


def registry() -> PodRegistry:
    pods = tuple(PodConfig(name=name, url=f"http://{name}:1") for name in "abc")
    made = PodRegistry(pods, (ModelConfig(name="m"),), PodWatchConfig(), clock=lambda: 0.0)
    for pod, model in zip("abc", "mmn", strict=True):
        made.learn(pod, served=ServedNames(base_model=model, aliases=frozenset({model}), adapters={}))
        made.answered(pod)
    return made


async def pods_of(previous: str | None, known: dict[str, str]) -> list[str]:
    async def find(name: str, tenant: str | None, may_search: bool) -> str | None:
        return known.get(name)

    body = b'{"model":"m","input":"x"%s}' % (
        b"" if previous is None else b',"previous_response_id":"%s"' % previous.encode()
    )
    found = await Destinations(registry(), find_response=find).of(parse("/v1/responses", body))
    return [pod.name for pod in found.pods]


async def test_a_conversation_goes_on_where_its_beginning_is_stored() -> None:
    assert await pods_of(None, {"r1": "b"}) == ["a", "b"]
    assert await pods_of("r1", {"r1": "b"}) == ["b"]
    assert await pods_of("r2", {"r1": "b"}) == ["a", "b"]


async def test_a_pod_that_does_not_serve_the_model_or_has_gone_is_not_chosen() -> None:
    assert await pods_of("r1", {"r1": "c"}) == ["a", "b"]
    assert await pods_of("r1", {"r1": "gone"}) == ["a", "b"]


async def test_a_request_about_a_stored_response_goes_to_its_pod_or_nowhere() -> None:
    async def find(name: str, tenant: str | None, may_search: bool) -> str | None:
        return {"r1": "c"}.get(name)

    destinations = Destinations(registry(), find_response=find)
    found = await destinations.of(opaque("/v1/responses/r1", 0, response_id="r1"))
    assert ([pod.name for pod in found.pods], found.model) == (["c"], "n")
    with pytest.raises(UnknownResponse):
        await destinations.of(opaque("/v1/responses/r2", 0, response_id="r2"))


async def test_a_search_that_is_refused_refuses_only_requests_about_the_response() -> None:
    async def find(name: str, tenant: str | None, may_search: bool) -> str | None:
        raise Overloaded("too many")

    destinations = Destinations(registry(), find_response=find)
    with pytest.raises(Overloaded):
        await destinations.of(opaque("/v1/responses/r1", 0, response_id="r1"))
    prompt = parse("/v1/responses", b'{"model":"m","input":"x","previous_response_id":"r1"}')
    assert len((await destinations.of(prompt)).pods) == 2


async def test_pods_are_asked_once_for_a_response_that_is_not_known() -> None:
    asked = []

    async def search(name: str) -> str | None:
        asked.append(name)
        return "a" if name == "r1" else None

    find = FindResponse(StoredResponses(), search)
    assert [await find("r1"), await find("r1"), await find("r2"), await find("r2")] == ["a", "a", None, None]
    assert asked == ["r1", "r2", "r2"]


def test_only_so_many_responses_are_remembered_and_the_longest_unused_goes_first() -> None:
    stored = StoredResponses(2)
    stored.remember("r1", "a")
    stored.remember("r2", "b")
    assert stored.keeper_of("r1") == ("a", None)
    stored.remember("r3", "c")
    assert (stored.keeper_of("r2"), stored.keeper_of("r3"), len(stored)) == (None, ("c", None), 2)


async def test_a_response_of_another_tenant_leads_to_no_pod_and_cannot_be_taken_over() -> None:
    async def search(name: str) -> str | None:
        raise AssertionError(name)

    stored = StoredResponses()
    stored.remember("r1", "a", "ann")
    stored.remember("r1", "b", "bob")  # by a request with an id of its own choice
    stored.remember("r1", "b")
    find = FindResponse(stored, search)
    assert await find("r1", "ann") == "a"
    destinations = Destinations(registry(), find_response=find)
    metrics = Metrics()
    bob = Caller(name="bob", tenant="bob", account="key:bob")
    goes_on = parse("/v1/responses", b'{"model":"m","input":"x","previous_response_id":"r1"}')
    for prompt in (goes_on, opaque("/v1/responses/r1", 0, response_id="r1")):
        with pytest.raises(UnknownResponse):
            await destinations.of(prompt, ticket=Gate(Rules(), metrics.access).ticket(bob))
    stored.remember("r1", "c", "ann")
    assert stored.keeper_of("r1") == ("c", "ann")


async def test_a_key_for_some_models_must_say_surely_which_it_asks_for() -> None:
    gate = Gate(Rules(), Metrics().access)
    some, every = (
        gate.ticket(Caller(name="a", tenant="a", account="key:a", models=models)) for models in (frozenset({"m"}), None)
    )
    destinations = Destinations(registry())
    unsure = opaque("/pooling", 9, model="m", names_surely=False)
    with pytest.raises(Forbidden):
        await destinations.of(unsure, ticket=some)
    assert (await destinations.of(unsure, ticket=every)).model == "m"
    assert (await destinations.of(opaque("/pooling", 9, model="m"), ticket=some)).model == "m"
