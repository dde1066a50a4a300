"""Which credentials a pod gets: the client's own, or the engine's key in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multidict import CIMultiDict

from matrixinfer.config.secrets import Secret

CLIENT_CREDENTIALS = ("authorization", "x-api-key", "api-key", "cookie")
"""Headers with which clients authenticate: for OpenAI's API, Anthropic's, Azure's, and in browsers."""


class Credentials:
    """Replaces the credentials in the headers for a pod, where that must be.

    `key_at` says which key the pod with a base URL requires. With `always`, requests of clients that nobody has
    authenticated carry it as well. `strips` are further headers that no pod gets.
    """

    def __init__(self, key_at: Callable[[str], Secret | None], *, always: bool, strips: Sequence[str] = ()) -> None:
        self._strips = strips
        self._key_at = key_at
        self._always = always

    def reconfigure(self, strips: Sequence[str]) -> None:
        """Strip these headers from now on."""
        self._strips = strips

    def apply(self, headers: CIMultiDict[str], url: str, *, is_authenticated: bool) -> None:
        """Change `headers`. Credentials that the gateway has accepted never reach a pod."""
        for name in self._strips:
            headers.popall(name, None)
        key = self._key_at(url) if is_authenticated or self._always else None
        if key is None and not is_authenticated:
            return
        for name in CLIENT_CREDENTIALS:
            headers.popall(name, None)
        if key is not None:
            headers["authorization"] = f"Bearer {key.reveal()}"
