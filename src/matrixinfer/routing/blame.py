"""Whose fault it is that a request failed: the endpoint's, or its own."""

from __future__ import annotations

from typing import NamedTuple

from matrixinfer.pods.outliers import Outliers


class _Accused(NamedTuple):
    endpoint: str
    reason: str
    is_probe: bool


class Blame:
    """The endpoints that failed a request which may itself be to blame. `close` ends it, whatever is known by then."""

    __slots__ = ("_accused", "_outliers")

    def __init__(self, outliers: Outliers) -> None:
        self._outliers = outliers
        self._accused: list[_Accused] = []

    def __bool__(self) -> bool:
        """Whether an endpoint is accused."""
        return bool(self._accused)

    @property
    def is_probe(self) -> bool:
        """Whether the last endpoint accused was to show that it works again."""
        return bool(self._accused) and self._accused[-1].is_probe

    def accuse(self, endpoint: str, reason: str, *, is_probe: bool) -> None:
        """The endpoint failed the request. If another one did so before, the request is to blame."""
        self._outliers.doubted(endpoint, reason, probe=is_probe)
        self._accused.append(_Accused(endpoint, reason, is_probe))
        if len(self._accused) > 1:
            self.void()

    def moved(self) -> None:
        """Another endpoint gets the request."""
        for each in self._accused:
            self._outliers.checking(each.endpoint)

    def answered(self) -> None:
        """Another endpoint has answered the request: the accused are to blame."""
        for each in self._accused:
            self._outliers.blamed(each.endpoint, each.reason, probe=each.is_probe)
        self._accused.clear()

    def void(self) -> None:
        """The request is to blame."""
        for each in self._accused:
            self._outliers.voided(each.endpoint, probe=each.is_probe)
        self._accused.clear()

    def close(self) -> None:
        """The request is over."""
        for each in self._accused:
            self._outliers.unchecked(each.endpoint)
        self._accused.clear()
