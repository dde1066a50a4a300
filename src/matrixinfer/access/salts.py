"""A cache salt per tenant, so that no two tenants share a block in an engine's cache. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac

MIN_SECRET_CHARS = 32


class Salts:
    """Derives salts from a secret that only the gateways know.

    Without the secret, nobody can compute a tenant's salt and ask for it, and a salt reveals nothing about the tenant's
    name.
    """

    def __init__(self, secret: str) -> None:
        self.secret = secret.encode()

    def of(self, tenant: str, own: str | None) -> str:
        """The salt of a tenant's request, in which the client asked for the salt `own`.

        43 characters of A–Z, a–z, 0–9, `-` and `_`, which every engine takes.
        """
        digest = hmac.new(self.secret, encoded(tenant, own), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def encoded(tenant: str, own: str | None) -> bytes:
    """Tenant and own salt as bytes. No two pairs have the same, and none begins with another's of the same tenant."""
    name = tenant.encode("utf-8", "surrogateescape")
    rest = b"\0" if own is None else b"\1" + own.encode("utf-8", "surrogatepass")
    return len(name).to_bytes(4, "big") + name + rest
