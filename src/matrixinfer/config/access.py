"""Who may use the gateway, how much of it, and how tenants share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from matrixinfer.config.base import Count, Seconds, Section, described
from matrixinfer.config.secrets import place
from matrixinfer.errors import ConfigError

if TYPE_CHECKING:
    from matrixinfer.config.schema import Config

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA"]
"""Signatures with a public key. One with a shared secret, or none, is never taken."""


class QuotaConfig(Section, frozen=True):
    """How much a key may use within a window. What is left out is not limited."""

    window_seconds: Annotated[Seconds, described("Length of the sliding window.")] = 60.0
    requests: Annotated[Count | None, described("Requests per window.")] = None
    concurrent_requests: Annotated[Count | None, described("Requests at the same time.")] = None
    input_tokens: Annotated[Count | None, described("Tokens of prompts per window.")] = None
    output_tokens: Annotated[Count | None, described("Generated tokens per window.")] = None
    uncached_tokens: Annotated[
        Count | None,
        described("Tokens of prompts per window that engines did not find in their caches, but had to compute."),
    ] = None


class JwtConfig(Section, frozen=True):
    """JSON Web Tokens of an identity provider (extra `jwt`)."""

    issuer: Annotated[str, described("The claim `iss`, exactly.")]
    audience: Annotated[tuple[str, ...], described("The claim `aud` must be, or contain, one of these.")]
    jwks_url: Annotated[str | None, described("URL of the provider's public keys (JWKS).")] = None
    jwks_file: Annotated[str | None, described("File with them, relative to the config file, in place of a URL.")] = (
        None
    )
    algorithms: Annotated[tuple[Algorithm, ...], described("Signatures that are taken.")] = (
        "RS256",
        "PS256",
        "ES256",
        "Ed25519",
        "EdDSA",
    )
    tenant_claim: Annotated[
        str | None,
        described("The claim that names the tenant. By default every subject (`sub`) is a tenant of its own."),
    ] = None
    models_claim: Annotated[
        str | None, described("The claim that lists the models that may be used. By default all may.")
    ] = None
    leeway_seconds: Annotated[
        Annotated[int, Meta(ge=0)], described("How far the clocks of provider and gateway may differ.")
    ] = 30
    refresh_seconds: Annotated[Seconds, described("How often the keys are read again.")] = 300.0
    keep_seconds: Annotated[
        Seconds, described("How long keys are believed that cannot be read again. Tokens are then answered with 503.")
    ] = 86_400.0


class TenantConfig(Section, frozen=True):
    """How a tenant is treated where requests wait for each other (`admission`)."""

    name: Annotated[str, described("The tenant, as keys and tokens name it.")]
    weight: Annotated[
        Annotated[float, Meta(gt=0, le=1000)], described("Its share, in tokens, of what all waiting tenants get.")
    ] = 1.0
    priority: Annotated[
        int, described("Requests of a tenant with a higher priority are admitted before all others.")
    ] = 0


class IsolationConfig(Section, frozen=True):
    """Keeps tenants' blocks apart in the engines' caches: no tenant gets a hit on another one's prompt."""

    secret_file: Annotated[
        str | None,
        described(
            "File with a secret of at least 32 characters, relative to the config file; all gateways need the same."
        ),
    ] = None
    secret_env: Annotated[str | None, described("Environment variable with that secret.")] = None


class AccessConfig(Section, frozen=True):
    """Who may use the gateway. Without this section everybody who reaches it may."""

    keys_file: Annotated[
        str | None,
        described("File with the hashes of API keys, relative to the config file. It is read again when it changes."),
    ] = None
    jwt: Annotated[JwtConfig | None, described("JSON Web Tokens that are taken in place of API keys.")] = None
    limits: Annotated[
        QuotaConfig, described("Limits of each key, or subject of a token, that has none of its own.")
    ] = QuotaConfig()
    count_in: Annotated[
        Literal["local", "redis"],
        described(
            "Where use is counted: in each gateway's own memory, or in `$.redis` for all gateways together. While Redis is "
            "lost, each gateway counts on its own."
        ),
    ] = "local"
    tenants: Annotated[tuple[TenantConfig, ...], described("Tenants that are not like all others.")] = ()
    isolation: Annotated[
        IsolationConfig | None, described("Keeps tenants apart in the engines' caches. By default they share them.")
    ] = None
    strip_headers: Annotated[
        tuple[str, ...],
        described("Further request headers that clients must not set: engines do not get them."),
    ] = ()


def check_access(config: Config) -> None:
    """Check what types cannot express. Raises `ConfigError`."""
    access = config.access
    if access is None:
        return
    if access.keys_file is None and access.jwt is None:
        raise ConfigError("$.access", "expected `keysFile`, `jwt` or both: without them nobody has access")
    jwt = access.jwt
    if jwt is not None:
        if (jwt.jwks_url is None) == (jwt.jwks_file is None):
            raise ConfigError("$.access.jwt", "expected one of `jwksUrl` and `jwksFile`")
        if jwt.jwks_url is not None and not jwt.jwks_url.startswith(("https://", "http://")):
            raise ConfigError("$.access.jwt.jwksUrl", f"expected an https URL, got `{jwt.jwks_url}`")
        for key in ("issuer", "audience", "algorithms"):
            if not getattr(jwt, key):
                raise ConfigError(f"$.access.jwt.{key}", "expected a value, got an empty one")
    seen: set[str] = set()
    for i, tenant in enumerate(access.tenants):
        if tenant.name in seen:
            raise ConfigError(f"$.access.tenants[{i}].name", f"the name `{tenant.name}` is already taken")
        seen.add(tenant.name)
    if access.isolation is not None:
        where = place(access.isolation.secret_file, access.isolation.secret_env, "$.access.isolation.secret")
        if where is None:
            raise ConfigError("$.access.isolation", "expected `secretFile` or `secretEnv`")
