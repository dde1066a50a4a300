"""Where a request may go: the model that it means, and the pods that serve it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from matrixinfer.access.gate import Ticket
from matrixinfer.errors import NoPodAvailable, Overloaded, UnknownModel, UnknownResponse
from matrixinfer.pods.registry import Pod, PodRegistry
from matrixinfer.prompt.base import Prompt
from matrixinfer.routing.routes import Route, Routes
from matrixinfer.routing.stored_responses import unknown

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Way(NamedTuple):
    """What decides about the pods that may get a request, beside its model."""

    route: Route | None = None
    """The route that it takes, if one fits."""
    keeper: str | None = None
    """The pod that stores the response which it continues or is about."""
    isolates: bool = False
    """Whether only engines count that keep its tenant apart."""


ANYWHERE = Way()


class Destination(NamedTuple):
    """The request, with the model that it means, and where it may go."""

    prompt: Prompt
    model: str
    """The index's name of the model."""
    pods: Sequence[Pod]
    way: Way = ANYWHERE


class Destinations:
    """Finds the pods of requests.

    `find_model` asks engines for a model that none has reported, and returns whether one serves it. `find_response`
    finds the pod that stores a response of a tenant, and asks pods for it if it may.
    """

    def __init__(
        self,
        registry: PodRegistry,
        find_model: Callable[[str], Awaitable[bool]] | None = None,
        find_response: Callable[[str, str | None, bool], Awaitable[str | None]] | None = None,
        routes: Routes | None = None,
    ) -> None:
        self._routes = Routes(()) if routes is None else routes  # one without a route may get some later
        self._registry = registry
        self._find_model = find_model
        self._find_response = find_response

    async def of(
        self,
        prompt: Prompt,
        request_id: str = "",
        session: str | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        ticket: Ticket | None = None,
    ) -> Destination:
        """Where a request may go. Raises `RequestError`, and `NoPodAvailable` when no pod serves its model.

        `headers` decide between routes, and the session or else the request's user sticks to its target.
        """
        keeper = None if prompt.response_id is None else await self._keeper(prompt, prompt.response_id, ticket)
        if prompt.response_id is not None and prompt.opaque:
            if keeper is None:
                raise unknown(prompt.response_id)
            return Destination(prompt, keeper.base_model or "", [keeper], Way(keeper=keeper.name))
        if not prompt.names_model:
            prompt = msgspec.structs.replace(prompt, model=self._registry.only_model())
        if ticket is not None:
            ticket.check_model(prompt.model, is_sure=prompt.names_surely)
        route = self._route(prompt, request_id, session, headers) if self._routes else None
        if route is not None and route.model != prompt.model:
            prompt = msgspec.structs.replace(prompt, model=route.model, asked=prompt.model)
        pods: Sequence[Pod]
        try:
            model, pods = self._registry.resolve(prompt.model)
        except (UnknownModel, NoPodAvailable):
            if self._find_model is None or not await self._find_model(prompt.model):
                raise
            model, pods = self._registry.resolve(prompt.model)
        way = ANYWHERE
        if route is not None or keeper is not None:
            way = Way(route=route, keeper=None if keeper is None else keeper.name)
            pods = _allowed(pods, way)
        return Destination(prompt, model, pods, way)

    def again(self, prompt: Prompt, way: Way) -> tuple[str, Sequence[Pod]]:
        """The model and the pods of now, for a request that has waited. Raises `RequestError` and `NoPodAvailable`."""
        if prompt.opaque and way.keeper is not None:
            keeper = self._registry.pod(way.keeper)
            if keeper is None:
                raise UnknownResponse("The pod that stored the response has gone.")
            return keeper.base_model or "", [keeper]
        model, pods = self._registry.resolve(prompt.model)
        return model, _allowed(pods, way)

    def _route(self, prompt: Prompt, request_id: str, session: str | None, headers: Mapping[str, str]) -> Route | None:
        return self._routes.choose(
            prompt.model, headers, key=session or prompt.user, otherwise=request_id, is_available=self._is_available
        )

    def _is_available(self, route: Route) -> bool:
        """Whether a pod can take requests of that route now."""
        try:
            _, pods = self._registry.resolve(route.model)
        except (UnknownModel, NoPodAvailable):
            return False
        return any(pod.healthy and route.allows(pod.name) for pod in pods)

    async def _keeper(self, prompt: Prompt, response_id: str, ticket: Ticket | None) -> Pod | None:
        """The pod that stores a response; None if no pod is known to. Raises `UnknownResponse` if it is another tenant's."""
        if self._find_response is None:
            return None
        owns = None if ticket is None else ticket.owns(response_id)
        if owns is False:
            raise unknown(response_id)
        # Where tenants are kept apart, a response that nobody knows the owner of is nobody's.
        may_search = owns is True or ticket is None or not ticket.isolates
        try:
            name = await self._find_response(response_id, None if ticket is None else ticket.tenant, may_search)
        except Overloaded:
            if prompt.opaque:
                raise
            return None
        return None if name is None else self._registry.pod(name)


def _allowed(pods: Sequence[Pod], way: Way) -> Sequence[Pod]:
    """Those pods of a model that a request may go to. Raises `NoPodAvailable`."""
    route = way.route
    if route is not None and not (pods := [pod for pod in pods if route.allows(pod.name)]):
        raise NoPodAvailable(f"No pod of the route {route.name} serves the model now.")
    # Without the beginning of the conversation the others could only refuse.
    return [pod for pod in pods if pod.name == way.keeper] or pods
