"""Which pod stores which response of `/v1/responses`: an engine keeps them in its own memory, and only that one has them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable

MOST_KEPT = 100_000
"""About 20 MB. The response that was longest unused is forgotten first; pods are then asked for it."""


class StoredResponses:
    """The pods of the last responses, by the response's id."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._pods: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pods)

    def remember(self, response_id: str, pod: str) -> None:
        """A pod has answered with this response."""
        self._pods[response_id] = pod
        self._pods.move_to_end(response_id)
        if len(self._pods) > self._most:
            self._pods.popitem(last=False)

    def pod_of(self, response_id: str) -> str | None:
        """The pod that stores a response; None if that is not known."""
        pod = self._pods.get(response_id)
        if pod is not None:
            self._pods.move_to_end(response_id)
        return pod


class FindResponse:
    """Finds the pod of a response: in memory, or else with `search`, which asks pods. Raises what that raises."""

    def __init__(self, stored: StoredResponses, search: Callable[[str], Awaitable[str | None]]) -> None:
        self._stored = stored
        self._search = search

    async def __call__(self, response_id: str) -> str | None:
        """The name of the pod that stores it; None if none is known to."""
        pod = self._stored.pod_of(response_id)
        if pod is None and (pod := await self._search(response_id)) is not None:
            self._stored.remember(response_id, pod)
        return pod
