from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from joserfc import jwk, jws

from matrixinfer.access import tokens as tokens_module
from matrixinfer.access.tokens import NoKeys, Tokens, UnknownKey, parse_key_set
from matrixinfer.config.access import JwtConfig, QuotaConfig
from matrixinfer.errors import Unauthenticated

NOW = 1_000_000.0
RSA = jwk.RSAKey.generate_key(2048, {"kid": "rsa", "use": "sig"})
EC = jwk.ECKey.generate_key("P-256", {"kid": "ec"})
ED = jwk.OKPKey.generate_key("Ed25519", {"kid": "ed"})
SHARED = jwk.OctKey.import_key("s" * 32, {"kid": "shared"})
CLAIMS = {"iss": "https://idp", "aud": "gateway", "sub": "alice", "exp": NOW + 100}
CONFIG = JwtConfig(issuer="https://idp", audience=("gateway", "other"), jwks_file="x")


def document(*keys: Any) -> bytes:
    return json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()


def checker(config: JwtConfig = CONFIG, *keys: Any, now: float = NOW) -> Tokens:
    tokens = Tokens(config, QuotaConfig(requests=3), lambda: now)
    tokens.use(parse_key_set(document(*(keys or (RSA, EC, ED)))))
    return tokens


def token(key: Any = EC, algorithm: str = "ES256", kid: str | None = "ec", **claims: Any) -> str:
    header = {"alg": algorithm} | ({} if kid is None else {"kid": kid})
    said = {name: value for name, value in (CLAIMS | claims).items() if value is not None}
    with warnings.catch_warnings(action="ignore"):  # of the old name of Ed25519
        return jws.serialize_compact(header, json.dumps(said), key, algorithms=[algorithm])


@pytest.mark.parametrize(("key", "algorithm", "kid"), [(RSA, "RS256", "rsa"), (EC, "ES256", "ec"), (ED, "EdDSA", "ed")])
def test_a_token_that_the_issuer_has_signed_is_taken(key: Any, algorithm: str, kid: str) -> None:
    caller = checker().check(token(key, algorithm, kid, aud=["x", "other"]))
    assert (caller.name, caller.tenant, caller.account) == ("alice", "alice", "jwt:alice")
    assert (caller.models, caller.quota) == (None, QuotaConfig(requests=3))


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://other"},
        {"iss": None},
        {"aud": "someone"},
        {"aud": None},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 300},
        pytest.param({"sub": "half a \ud83d"}, id="half a character"),
        {"exp": None},
        {"exp": NOW - 31},
        {"exp": "soon"},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": 10**400},
        {"nbf": NOW + 31},
        {"iat": NOW + 31},
    ],
    ids=str,
)
def test_claims_that_do_not_hold_are_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        checker().check(token(**claims))


def test_clocks_may_differ_a_little() -> None:
    assert checker(now=NOW + 129).check(token(nbf=NOW + 150)).name == "alice"


def test_only_signatures_of_the_issuer_count() -> None:
    tokens, forged = checker(), jwk.ECKey.generate_key("P-256", {"kid": "ec"})
    with pytest.raises(Unauthenticated):
        tokens.check(token(forged))
    with pytest.raises(Unauthenticated):  # a shared secret under the name of a public key
        tokens.check(token(SHARED, "HS256", "rsa"))
    head, body, signature = token().split(".")
    for bad in (f"{head}.{body}.", f"eyJhbGciOiJub25lIn0.{body}.", "..", "a.b.c", f"{head}.{body[:-4]}.{signature}"):
        with pytest.raises((Unauthenticated, UnknownKey)):
            tokens.check(bad)
    with pytest.raises(Unauthenticated):
        tokens.check("a" * 20_000)


def test_a_signature_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(Unauthenticated):
        checker(JwtConfig(issuer="https://idp", audience=("gateway",), jwks_file="x", algorithms=("RS256",))).check(
            token()
        )


def test_a_token_without_the_name_of_its_key_needs_a_single_key() -> None:
    assert checker(CONFIG, EC).check(token(kid=None)).name == "alice"
    with pytest.raises(UnknownKey):
        checker().check(token(kid=None))


def test_tenant_and_models_come_from_claims() -> None:
    config = JwtConfig(issuer="https://idp", audience=("gateway",), jwks_file="x", tenant_claim="org", models_claim="m")
    for models in (["a", "b"], "a b"):
        caller = checker(config).check(token(org="lab", m=models))
        assert (caller.name, caller.tenant, caller.models) == ("alice", "lab", frozenset({"a", "b"}))
    for claims in ({"m": ["a"]}, {"org": "lab"}, {"org": "lab", "m": [1]}, {"org": ["lab"], "m": ["a"]}):
        with pytest.raises(Unauthenticated):
            checker(config).check(token(**claims))


def test_keys_that_are_withdrawn_count_no_longer() -> None:
    tokens, signed = checker(), token()
    assert tokens.check(signed) is tokens.check(signed)  # remembered
    tokens.use(parse_key_set(document(RSA)))
    with pytest.raises(UnknownKey):
        tokens.check(signed)


def test_a_remembered_token_expires() -> None:
    now = NOW
    tokens = Tokens(CONFIG, QuotaConfig(), lambda: now)
    tokens.use(parse_key_set(document(EC)))
    signed = token()
    assert tokens.check(signed).name == "alice"
    now = NOW + 131
    with pytest.raises(Unauthenticated, match="expired"):
        tokens.check(signed)


def test_few_tokens_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MAX_REMEMBERED", 2)
    tokens = checker()
    first, second, third = (token(sub=name) for name in "abc")
    callers = [tokens.check(each) for each in (first, second, third)]
    assert tokens.check(third) is callers[2]
    assert tokens.check(first) is not callers[0]


def test_keys_that_cannot_be_used_are_left_out() -> None:
    others = [
        {"kty": "RSA"},
        {"kty": "odd"},
        {},
        {**EC.as_dict(private=False), "use": "enc"},
        SHARED.as_dict(private=True),
    ]
    data = json.dumps({"keys": [*others, ED.as_dict(private=False)]}).encode()
    assert [key.kid for key in parse_key_set(data)] == ["ed"]
    for bad in (b"", b"[]", b'{"keys": 1}', b'{"keys": []}', json.dumps({"keys": others}).encode()):
        with pytest.raises(NoKeys):
            parse_key_set(bad)
