"""Ids of stored responses that say whose they are, to whoever has the secret: no gateway needs to remember it. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable

_ID = re.compile(r"resp_([0-9a-f]{32})([0-9a-f]{16})([0-9a-f]{32})")
"""Random digits, a tag of the gateways' and one of the tenant's."""


class ResponseIds:
    """Makes ids and tells their owners. `random` returns so many random bytes."""

    def __init__(self, secret: bytes, random: Callable[[int], bytes]) -> None:
        self._key = hmac.digest(secret, b"ids of responses", hashlib.sha256)
        self._random = random

    def new(self, tenant: str) -> str:
        """An id for a response of a tenant, which engines take as a request's `request_id`."""
        drawn = self._random(16)
        return f"resp_{drawn.hex()}{self._own(drawn).hex()}{self._of(tenant, drawn).hex()}"

    def is_owner(self, tenant: str, response_id: str) -> bool | None:
        """Whether a response belongs to a tenant; None if the id was not made with this secret."""
        found = _ID.fullmatch(response_id)
        if found is None:
            return None
        drawn, own, tag = (bytes.fromhex(part) for part in found.groups())
        if not hmac.compare_digest(own, self._own(drawn)):
            return None
        return hmac.compare_digest(tag, self._of(tenant, drawn))

    def _own(self, drawn: bytes) -> bytes:
        return hmac.digest(self._key, b"\0" + drawn, hashlib.sha256)[:8]

    def _of(self, tenant: str, drawn: bytes) -> bytes:
        return hmac.digest(self._key, b"\1" + drawn + tenant.encode("utf-8", "surrogateescape"), hashlib.sha256)[:16]
