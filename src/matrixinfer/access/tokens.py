"""Verifies JSON Web Tokens with the keys at hand, and finds their holders. Needs the extra `jwt`."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import msgspec
from joserfc import jwk, jwt
from joserfc.errors import ExpiredTokenError, JoseError, SecurityWarning
from joserfc.jwk import GuestProtocol

from matrixinfer.access.callers import Caller
from matrixinfer.config.access import JwtConfig, QuotaConfig
from matrixinfer.errors import UNREADABLE, MatrixInferError, Unauthenticated

MAX_KEYS = 256
"""More keys of a provider are not read."""
MAX_REMEMBERED = 4096
"""Tokens whose signatures are not checked again."""
MAX_TOKEN_CHARS = 16 * 1024
_MAX_NAME_CHARS = 256
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can escape and nothing can encode."""
_MAX_SECONDS = 1e15
"""Later than that never comes, and would not fit a float."""

Key = jwk.RSAKey | jwk.ECKey | jwk.OKPKey


class UnknownKey(MatrixInferError):
    """A token is signed with a key that is not among those at hand."""


class NoKeys(MatrixInferError):
    """A document has no public key that can be used."""


class _Document(msgspec.Struct):
    keys: list[dict[str, Any]]


def parse_key_set(data: bytes) -> Sequence[Key]:
    """The public keys of a JWKS document; what cannot be used is left out. Raises `NoKeys`."""
    try:
        entries = msgspec.json.decode(data, type=_Document).keys
    except UNREADABLE as error:
        raise NoKeys("expected a JSON object with a list `keys`") from error
    found: list[Key] = []
    for entry in entries[:MAX_KEYS]:
        if entry.get("use", "sig") != "sig":
            continue
        try:
            key = jwk.import_key(entry)
        except (JoseError, ValueError, TypeError, KeyError):
            continue
        if isinstance(key, Key):  # a shared secret would let its readers sign
            found.append(key)
    if not found:
        raise NoKeys("expected public keys for signatures, found none that can be used")
    return found


class Tokens:
    """Checks tokens. `now` returns Unix seconds; callers get `quota`."""

    def __init__(self, config: JwtConfig, quota: QuotaConfig, now: Callable[[], float]) -> None:
        self._config = config
        self._quota = quota
        self._now = now
        self._claims = jwt.JWTClaimsRegistry(
            now=lambda: int(now()),
            leeway=config.leeway_seconds,
            iss={"essential": True, "value": config.issuer},
            aud={"essential": True, "values": list(config.audience)},
            exp={"essential": True},
            sub={"essential": True},
        )
        self._remembered: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()
        self._keys: Sequence[Key] = ()

    def use(self, keys: Sequence[Key]) -> None:
        """Check tokens with these keys from now on."""
        if [key.as_dict() for key in keys] != [key.as_dict() for key in self._keys]:
            self._keys = keys
            self._remembered.clear()

    def check(self, token: str) -> Caller:
        """Who holds a token. Raises `Unauthenticated`, and `UnknownKey` if it is signed with a key that is not at hand."""
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthenticated("The token is too long.")
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        known = self._remembered.get(digest)
        if known is not None and self._now() < known[1]:
            self._remembered.move_to_end(digest)
            return known[0]
        claims = self._verified(token)
        caller = self._caller(claims)
        self._remembered[digest] = caller, float(claims["exp"]) + self._config.leeway_seconds
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        return caller

    def _verified(self, token: str) -> Mapping[str, Any]:
        try:
            with warnings.catch_warnings():  # of the old name of Ed25519, which providers still use
                warnings.simplefilter("ignore", SecurityWarning)
                claims = jwt.decode(token, self._key_for, algorithms=self._config.algorithms).claims
            self._claims.validate(claims)
        except ExpiredTokenError as error:
            raise Unauthenticated("The token has expired.") from error
        except (JoseError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise Unauthenticated(f"The token is not valid: {_reason(error)}.") from error
        if not abs(claims["exp"]) < _MAX_SECONDS:
            raise Unauthenticated("The token is not valid: it never expires.")
        return claims

    def _key_for(self, token: GuestProtocol) -> Key:
        name = token.headers().get("kid")
        if name is None and len(self._keys) == 1:
            return self._keys[0]
        for key in self._keys:
            if name is not None and key.kid == name:
                return key
        raise UnknownKey("no key of that name")

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        subject = _name(claims["sub"], "sub")
        tenant, models = subject, None
        if self._config.tenant_claim is not None:
            tenant = _name(claims.get(self._config.tenant_claim), self._config.tenant_claim)
        if self._config.models_claim is not None:
            listed = claims.get(self._config.models_claim)
            listed = listed.split() if isinstance(listed, str) else listed
            if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
                raise Unauthenticated(f"The token is not valid: `{self._config.models_claim}` lists no models.")
            models = frozenset(listed)
        return Caller(name=subject, tenant=tenant, account=f"jwt:{subject}", models=models, quota=self._quota)


def _name(value: object, claim: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME_CHARS or _SURROGATE.search(value):
        raise Unauthenticated(f"The token is not valid: `{claim}` is no name.")
    return value


def _reason(error: Exception) -> str:
    """What is wrong with a token, without any of its content."""
    return error.error.replace("_", " ") if isinstance(error, JoseError) else "it cannot be read"
