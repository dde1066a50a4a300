"""The file of API keys. It has their hashes only, so that whoever reads it cannot use them."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated

from msgspec import Meta

from matrixinfer.access.callers import Caller
from matrixinfer.config import Section, convert
from matrixinfer.config.access import QuotaConfig
from matrixinfer.config.reading import yaml_data
from matrixinfer.errors import ConfigError

PREFIX = "mi-"
"""Prefix of the keys that this project makes, so that scanners for leaked secrets find them."""


class KeyEntry(Section, frozen=True):
    """One API key."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    hash: Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
    tenant: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    models: tuple[str, ...] | None = None
    expires: datetime | None = None
    limits: QuotaConfig | None = None


class _KeyFile(Section, frozen=True):
    keys: tuple[KeyEntry, ...] = ()


class KeyRing:
    """The keys of a file: digest, holder and end, by the first bytes of the digest."""

    def __init__(self, entries: Mapping[bytes, tuple[bytes, Caller, float | None]] | None = None) -> None:
        self._entries = entries or {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> set[str]:
        """The names of all keys."""
        return {caller.name for _, caller, _ in self._entries.values()}

    def find(self, key: str, now: float) -> Caller | None:
        """The holder of a key at `now`, in Unix seconds; None if the key is unknown or has expired.

        The time of the search depends only on the key's digest, which nobody can choose; digests are compared in
        constant time.
        """
        digest = sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = self._entries.get(digest[:8])
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        _, caller, expires = found
        return caller if expires is None or now < expires else None


def new_key() -> str:
    """A new API key, with 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What the file has of a key. A key is random and long, so that a fast hash is enough."""
    return f"sha256:{sha256(key.encode()).hexdigest()}"


def parse_keys(text: str, default: QuotaConfig) -> KeyRing:
    """The keys in a file's text; those without limits get `default`. Raises `ConfigError`.

    A plain list is taken as well: it is what `matrixinfer keys create >> FILE` makes of a new file.
    """
    data = yaml_data(text)
    if data is None or isinstance(data, list):
        data = {"keys": data or []}
    entries = convert(data, _KeyFile, path="$").keys
    found: dict[bytes, tuple[bytes, Caller, float | None]] = {}
    names: set[str] = set()
    for i, entry in enumerate(entries):
        if entry.name in names:
            raise ConfigError(f"$.keys[{i}].name", f"the name `{entry.name}` is already taken")
        digest = bytes.fromhex(entry.hash.removeprefix("sha256:"))
        if digest[:8] in found:
            raise ConfigError(f"$.keys[{i}].hash", f"this is the key of `{found[digest[:8]][1].name}` as well")
        names.add(entry.name)
        found[digest[:8]] = digest, _caller(entry, default), _timestamp(entry.expires)
    return KeyRing(found)


def _caller(entry: KeyEntry, default: QuotaConfig) -> Caller:
    return Caller(
        name=entry.name,
        tenant=entry.name if entry.tenant is None else entry.tenant,
        account=f"key:{entry.name}",
        models=None if entry.models is None else frozenset(entry.models),
        quota=default if entry.limits is None else entry.limits,
    )


def _timestamp(moment: datetime | None) -> float | None:
    if moment is None:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
