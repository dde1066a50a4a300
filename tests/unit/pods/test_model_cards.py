"""What engines say about their models, and what is passed on."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from matrixinfer.pods.engine_api import parse_models
from matrixinfer.pods.model_cards import ModelCard, ServedModel, openai_view

CARD = {
    "id": "tiny",
    "object": "model",
    "created": 1_700_000_000,
    "owned_by": "vllm",
    "root": "/models/tiny",
    "parent": None,
    "max_model_len": 8192,
    "permission": [{"id": "modelperm-1", "object": "model_permission", "allow_sampling": True}],
}


def view(**fields: Any) -> dict[str, Any]:
    """What the gateway passes on of a card with these fields."""
    served = parse_models(json.dumps({"data": [{**CARD, **fields}]}).encode())
    assert served is not None
    shown: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode(openai_view(ServedModel(name="tiny", card=served.cards["tiny"])))
    )
    return shown


def test_the_fields_of_an_engine_pass() -> None:
    assert view() == {**CARD, "owned_by": "matrixinfer"}


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("created", "yesterday", 0),
        ("created", -1, 0),
        ("created", 10**30, 0),
        ("max_model_len", "long", None),
        ("max_model_len", 1.5, None),
        ("max_model_len", None, None),
        ("permission", {"a": 1}, []),
        ("permission", None, []),
        ("permission", ["x" * 10_000], []),
    ],
)
def test_a_field_that_makes_no_sense_costs_only_itself(field: str, value: object, shown: object) -> None:
    assert view(**{field: value}) == {**CARD, "owned_by": "matrixinfer", field: shown}


def test_a_model_that_nobody_describes_has_a_card_all_the_same() -> None:
    assert openai_view(ServedModel(name="x", card=ModelCard()))["created"] == 0
