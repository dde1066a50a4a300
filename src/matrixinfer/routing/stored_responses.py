"""Which pod stores which response of `/v1/responses`: an engine keeps them in its own memory, and only that one has them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable

from matrixinfer.errors import UnknownResponse

MOST_KEPT = 100_000
"""About 20 MB. The least recently used response is forgotten first; pods are then asked for it."""


class StoredResponses:
    """The pods of the last responses, by the response's id."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._kept: OrderedDict[str, tuple[str, str | None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def remember(self, response_id: str, pod: str, tenant: str | None = None) -> None:
        """A pod has answered a request of a tenant with this response; None for a tenant that is not known.

        Clients may choose ids: one that another tenant has already stays with that tenant.
        """
        kept = self._kept.get(response_id)
        if kept is None or kept[1] == tenant:
            self._kept[response_id] = pod, tenant
        self._kept.move_to_end(response_id)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def keeper_of(self, response_id: str) -> tuple[str, str | None] | None:
        """The pod that stores a response, and the tenant that it belongs to; None if unknown."""
        kept = self._kept.get(response_id)
        if kept is not None:
            self._kept.move_to_end(response_id)
        return kept


class FindResponse:
    """Finds the pod of a response: in memory, or else with `search`, which asks pods. Raises what that raises."""

    def __init__(self, stored: StoredResponses, search: Callable[[str], Awaitable[str | None]]) -> None:
        self._stored = stored
        self._search = search

    async def __call__(self, response_id: str, tenant: str | None = None, may_search: bool = True) -> str | None:
        """The name of the pod that stores it; None if none is known to. Raises `UnknownResponse` if it is another tenant's.

        So it does if the owner is not known and pods may not be asked: a request to go on with it must not reach any pod, as
        that could be the one that stores it.
        """
        kept = self._stored.keeper_of(response_id)
        if kept is not None:
            pod, owner = kept
            if tenant is None or owner is None or owner == tenant:
                return pod
            raise unknown(response_id)
        if not may_search:
            raise unknown(response_id)
        found = await self._search(response_id)
        if found is not None:
            self._stored.remember(response_id, found)
        return found


def unknown(response_id: str) -> UnknownResponse:
    """What a client gets that asks for a response which is not there, or not its own."""
    return UnknownResponse(f"No pod stores the response `{response_id[:200]}`.")
