"""Finds out whether an endpoint or the request itself is to blame for a failure."""

from __future__ import annotations

from typing import NamedTuple

from matrixinfer.pods.outliers import Outliers


class _Accused(NamedTuple):
    endpoint: str
    reason: str
    is_probe: bool


class Blame:
    """The endpoints that failed a request which may itself be to blame.

    If another endpoint answers it, they are to blame; if two or more failed it and none has answered, the request is. In
    the same way, if two or more answered 429 and none anything else, that is a limit on the client and not on them.
    """

    __slots__ = ("_accused", "_limited", "_outliers")

    def __init__(self, outliers: Outliers) -> None:
        self._outliers = outliers
        self._accused: list[_Accused] = []
        self._limited: list[str] = []

    def __bool__(self) -> bool:
        """Whether an endpoint is accused."""
        return bool(self._accused)

    @property
    def needs_witness(self) -> bool:
        """Whether a single endpoint is accused, which is ejected if another one answers the request."""
        if len(self._accused) != 1:
            return False
        return self._accused[0].is_probe or self._outliers.is_due(self._accused[0].endpoint)

    def accuse(self, endpoint: str, reason: str, *, is_probe: bool) -> None:
        """The endpoint failed the request."""
        self._outliers.doubted(endpoint, reason, probe=is_probe)
        self._accused.append(_Accused(endpoint, reason, is_probe))

    def limited(self, endpoint: str) -> None:
        """The endpoint answered 429, and counts as busy."""
        self._limited.append(endpoint)

    def moved(self) -> None:
        """Another endpoint gets the request."""
        for each in self._accused:
            self._outliers.checking(each.endpoint)

    def answered(self) -> None:
        """Another endpoint has answered the request: the accused are to blame."""
        for each in self._accused:
            self._outliers.blamed(each.endpoint, each.reason, probe=each.is_probe)
        self._accused.clear()
        self._limited.clear()

    def void(self) -> None:
        """The request is to blame."""
        for each in self._accused:
            self._outliers.voided(each.endpoint, probe=each.is_probe)
        self._accused.clear()

    def close(self) -> None:
        """The request is over, and the client has got an error, or has gone."""
        if len(self._accused) > 1:
            self.void()
        for each in self._accused:
            self._outliers.unchecked(each.endpoint)
        self._accused.clear()
        for endpoint in self._limited if len(self._limited) > 1 else ():
            self._outliers.not_busy(endpoint)
        self._limited.clear()
