"""`/v1/models`: what is served, in the shape of OpenAI's API or, for clients that send `anthropic-version`, of Anthropic's."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import msgspec
from aiohttp import web

from matrixinfer.errors import InvalidRequest, MatrixInferError, UnknownModel
from matrixinfer.gateway.errors import response_to
from matrixinfer.gateway.listener import Routes
from matrixinfer.gateway.protected import caller_of
from matrixinfer.gateway.responses import json_response
from matrixinfer.pods.model_cards import ServedModel, openai_view
from matrixinfer.pods.registry import PodRegistry

PATH = "/v1/models"
_PAGE, _LARGEST_PAGE = 20, 1000


class Models:
    """The models of all pods. `find` asks engines for a model that none has reported.

    `routed` gives the names of routes, with the models that requests for them may get.
    """

    def __init__(
        self,
        registry: PodRegistry,
        find: Callable[[str], Awaitable[bool]],
        routed: Callable[[], Mapping[str, Sequence[str]]] = dict,
    ) -> None:
        self._routed = routed
        self._registry = registry
        self._find = find

    def routes(self) -> Routes:
        """The list, and each model below it; ids may have slashes."""
        return {PATH: {"GET": self.list}, f"{PATH}/": {"GET": self.one}}

    async def list(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every model that a pod serves."""
        caller = caller_of(request)
        models = [each for each in self._models() if caller is None or caller.may_use(each.name)]
        if not _is_anthropic(request):
            return json_response({"object": "list", "data": [openai_view(model) for model in models]})
        try:
            return json_response(_page(models, request.rel_url.query))
        except MatrixInferError as error:
            return response_to(error, anthropic=True)

    async def one(self, request: web.BaseRequest) -> web.StreamResponse:
        """One model. Engines are asked again for one that none of them has reported."""
        anthropic = _is_anthropic(request)
        name = unquote(request.rel_url.raw_path.removeprefix(f"{PATH}/"))
        caller, model = caller_of(request), None
        if caller is None or caller.may_use(name):
            model = self._model(name)
            if model is None and name and await self._find(name):
                model = self._model(name)
        if model is None:
            return response_to(
                UnknownModel(f"The model `{name[:200]}` does not exist.", param="model"), anthropic=anthropic
            )
        return json_response(_anthropic_view(model) if anthropic else openai_view(model))

    def _model(self, name: str) -> ServedModel | None:
        return next((model for model in self._models() if model.name == name), None)

    def _models(self) -> Sequence[ServedModel]:
        """What is served under its own name, and under those of routes; a route shows its first model that is served."""
        served = {model.name: model for model in self._registry.models()}
        for name, targets in self._routed().items():
            target = next((served[each] for each in targets if each in served), None)
            if target is not None:
                served[name] = msgspec.structs.replace(target, name=name)
        return [served[name] for name in sorted(served)]


def _is_anthropic(request: web.BaseRequest) -> bool:
    return "anthropic-version" in request.headers


def _page(models: Sequence[ServedModel], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of the list, as its cursors say. Raises `InvalidRequest`."""
    limit = query.get("limit", str(_PAGE))
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= _LARGEST_PAGE:
        raise InvalidRequest(f"limit: expected a number from 1 to {_LARGEST_PAGE}, got `{limit[:20]}`")
    names = [model.name for model in models]
    for cursor in ("after_id", "before_id"):
        if cursor in query and query[cursor] not in names:
            raise InvalidRequest(f"{cursor}: no model is called `{query[cursor][:200]}`")
    start = names.index(query["after_id"]) + 1 if "after_id" in query else 0
    end = names.index(query["before_id"]) if "before_id" in query else len(names)
    whole = models[start:end]
    is_backwards = "before_id" in query and "after_id" not in query
    page = whole[-int(limit) :] if is_backwards else whole[: int(limit)]
    return {
        "data": [_anthropic_view(model) for model in page],
        "has_more": len(page) < len(whole),
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }


def _anthropic_view(model: ServedModel) -> dict[str, Any]:
    try:
        created = datetime.fromtimestamp(model.card.created or 0, UTC)
    except (ValueError, OverflowError, OSError):
        created = datetime.fromtimestamp(0, UTC)
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
    }
