"""What engines say about each of their models in `/v1/models`, and what the gateway says there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

_MAX_EXTRA_BYTES = 8 * 1024
"""Longer permissions are left out."""

_Natural = Annotated[int, Meta(ge=0, le=2**53)]
_NATURAL = msgspec.json.Decoder(_Natural)


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine says about one model. None where it says nothing, or nothing sensible."""

    created: int | None = None
    """Unix seconds."""
    root: str | None = None
    max_model_len: int | None = None
    """Maximum number of tokens of prompt and reply together."""
    permission: msgspec.Raw | None = None


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the gateway's `/v1/models`."""

    name: str
    parent: str | None = None
    """The model that an adapter adapts; None for base models."""
    card: ModelCard = ModelCard()


def merged(cards: Sequence[ModelCard]) -> ModelCard:
    """One card for a model that several pods serve, any of which may get a request.

    The smallest `max_model_len`, because it fits them all; the earliest `created`; and otherwise what the first says
    that says something.
    """
    return ModelCard(
        created=min((card.created for card in cards if card.created is not None), default=None),
        root=next((card.root for card in cards if card.root is not None), None),
        max_model_len=min((card.max_model_len for card in cards if card.max_model_len is not None), default=None),
        permission=next((card.permission for card in cards if card.permission is not None), None),
    )


def kept(new: Mapping[str, ModelCard], before: Mapping[str, ModelCard]) -> Mapping[str, ModelCard]:
    """`new`, but with the `created` of cards that were there before: engines say the time of the question there."""
    return {
        name: card
        if name not in before or before[name].created is None
        else msgspec.structs.replace(card, created=before[name].created)
        for name, card in new.items()
    }


def natural(value: msgspec.Raw) -> int | None:
    """A number of tokens or seconds; None if it is none."""
    try:
        return _NATURAL.decode(value)
    except msgspec.MsgspecError:
        return None


def extra(value: msgspec.Raw) -> msgspec.Raw | None:
    """A list that is passed on as it is, if it is short; a copy, so that the rest of the answer can be freed."""
    if memoryview(value).nbytes > _MAX_EXTRA_BYTES or not bytes(value).lstrip().startswith(b"["):
        return None
    return msgspec.Raw(bytes(value))


def openai_view(model: ServedModel) -> dict[str, Any]:
    """A model as OpenAI's API and the engines show it."""
    card = model.card
    return {
        "id": model.name,
        "object": "model",
        "created": card.created or 0,
        "owned_by": "matrixinfer",
        "root": card.root,
        "parent": model.parent,
        "max_model_len": card.max_model_len,
        "permission": [] if card.permission is None else card.permission,
    }
