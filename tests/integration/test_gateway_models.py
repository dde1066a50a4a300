"""`/v1/models`, in the shapes of both APIs."""

from __future__ import annotations

from typing import Any

import pytest

from matrixinfer.pods.model_cards import ModelCard
from matrixinfer.pods.registry import ServedNames
from tests.integration.gateway_support import Rig, nowhere, rig

NAMES = ("tiny", "org/tiny", "lora/a b")
SERVED = ServedNames(
    base_model="tiny",
    aliases=frozenset(NAMES[:2]),
    adapters={NAMES[2]: "tiny"},
    cards={name: ModelCard(root=f"/{name}", max_model_len=512, created=86_400) for name in NAMES},
)
ANTHROPIC = {"anthropic-version": "2023-06-01"}


async def get(gateway: Rig, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    async with gateway.client.get(f"{gateway.url}{path}", headers=headers) as response:
        return response.status, await response.json()


async def test_the_list_and_each_model_say_the_same() -> None:
    async with rig(nowhere()) as gateway:
        gateway.router.registry.learn("a", served=SERVED)
        status, found = await get(gateway, "/v1/models")
        assert status == 200
        assert [card["id"] for card in found["data"]] == sorted(NAMES)
        for path, card in zip(("lora%2Fa%20b", "org/tiny", "tiny"), found["data"], strict=True):
            assert await get(gateway, f"/v1/models/{path}") == (200, card)
        assert found["data"][0] == {
            "id": "lora/a b",
            "object": "model",
            "created": 86_400,
            "owned_by": "matrixinfer",
            "root": "/lora/a b",
            "parent": "tiny",
            "max_model_len": 512,
            "permission": [],
        }
        async with gateway.client.head(f"{gateway.url}/v1/models/tiny") as response:
            assert response.status == 200
        async with gateway.client.post(f"{gateway.url}/v1/models/tiny") as response:
            assert (response.status, response.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("name", ["none", "", "tiny/", "%00"])
async def test_a_model_that_is_not_there_is_sought_and_then_not_found(name: str) -> None:
    async with rig(nowhere()) as gateway:
        gateway.router.registry.learn("a", served=SERVED)
        status, found = await get(gateway, f"/v1/models/{name}")
        assert (status, found["error"]["code"], found["error"]["param"]) == (404, "model_not_found", "model")
        assert len(gateway.router.sought) == (1 if name else 0)
        status, found = await get(gateway, f"/v1/models/{name}", ANTHROPIC)
        assert (status, found["type"], found["error"]["type"]) == (404, "error", "not_found_error")


async def test_clients_of_anthropic_s_api_get_its_shape_page_by_page() -> None:
    async with rig(nowhere()) as gateway:
        gateway.router.registry.learn("a", served=SERVED)
        first = {"type": "model", "id": "lora/a b", "display_name": "lora/a b", "created_at": "1970-01-02T00:00:00Z"}
        assert await get(gateway, "/v1/models/lora/a%20b", ANTHROPIC) == (200, first)
        pages = {}
        for query in ("", "?limit=1", "?limit=1&after_id=lora/a%20b", "?after_id=tiny", "?limit=1&before_id=tiny"):
            _, page = await get(gateway, f"/v1/models{query}", ANTHROPIC)
            ids = [model["id"] for model in page["data"]]
            assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
            pages[query] = ids, page["has_more"]
        assert list(pages.values()) == [
            (sorted(NAMES), False),
            (["lora/a b"], True),
            (["org/tiny"], True),
            ([], False),
            (["org/tiny"], True),
        ]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "limit=" + "1" * 23, "after_id=none", "before_id="]
)
async def test_cursors_that_make_no_sense_are_refused(query: str) -> None:
    async with rig(nowhere()) as gateway:
        gateway.router.registry.learn("a", served=SERVED)
        status, found = await get(gateway, f"/v1/models?{query}", ANTHROPIC)
        assert (status, found["type"], found["error"]["type"]) == (400, "error", "invalid_request_error")
        assert (await get(gateway, f"/v1/models?{query}"))[0] == 200  # OpenAI's list has no pages
