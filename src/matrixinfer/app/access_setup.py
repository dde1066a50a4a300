"""Builds what decides about access from the configuration."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from matrixinfer.access.admission import Admission
from matrixinfer.access.fair_queue import Standing
from matrixinfer.access.gate import Gate, Rules
from matrixinfer.access.identity import Identity, read_keys
from matrixinfer.access.limits import Limits
from matrixinfer.access.response_ids import ResponseIds
from matrixinfer.access.salts import MIN_SECRET_CHARS, Salts
from matrixinfer.access.shared import SharedLedger
from matrixinfer.config import Config
from matrixinfer.config.access import IsolationConfig
from matrixinfer.config.engine_keys import key_places
from matrixinfer.config.secrets import place
from matrixinfer.errors import ConfigError
from matrixinfer.index.redis.store import Store
from matrixinfer.telemetry.access_metrics import AccessMetrics


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """What one configuration says about access, with its keys read."""

    config: Config
    identity: Identity | None = None
    salts: Salts | None = None


class Access:
    """The gate before all requests, and what of it may change. Use as an async context manager.

    With `store`, limits may be counted for all gateways together. `secret` is that of all workers of this gateway; where
    tenants are kept apart, all gateways have one in the configuration.
    """

    def __init__(self, config: Config, metrics: AccessMetrics, store: Store | None, secret: bytes) -> None:
        self.gate: Gate | None = None
        """None if everybody may send anything at any time."""
        self.policy = Policy(config=config)
        """The one in effect."""
        self._metrics = metrics
        self._store = store
        self._secret = secret
        self._limits: Limits | None = None
        self._queue: Admission | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Read the keys. Raises `ConfigError`."""
        config, store = self.policy.config, self._store
        async with AsyncExitStack() as stack:
            if config.access is not None:
                shared = None if config.access.count_in == "local" or store is None else SharedLedger(store)
                deadline = store.config.deadline_seconds if store is not None else 1.0
                limits = Limits(shared, deadline_seconds=deadline, on_degraded=self._metrics.limits_degraded)
                self._limits = await stack.enter_async_context(limits)
            if config.admission is not None:
                self._queue = Admission(config.admission, _standings(config), self._metrics)
            if config.access is not None or config.admission is not None:
                policy = await self.prepare(config)
                self.gate = Gate(self._rules(policy), self._metrics)
                self.policy = policy
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await _close(self.policy)
        finally:
            await self._stack.aclose()

    async def prepare(self, config: Config) -> Policy:
        """What a configuration says; nothing changes yet. Give it to `enforce`, or to `drop`. Raises `ConfigError`."""
        now, access = self.policy, config.access
        if access is None:
            return Policy(config=config)
        if now.identity is not None and now.config.access == access:
            return replace(now, config=config)
        found = None if access.isolation is None else salts(access.isolation)
        identity = Identity(access, before=now.identity)
        return Policy(config=config, identity=await identity.__aenter__(), salts=found)

    def enforce(self, policy: Policy) -> None:
        """Put a policy into effect, for new requests and those that wait for their turn."""
        self.policy = policy
        if self.gate is not None:
            self.gate.reconfigure(self._rules(policy))
        if self._queue is not None and policy.config.admission is not None:
            self._queue.reconfigure(policy.config.admission, _standings(policy.config))

    async def drop(self, policy: Policy) -> None:
        """A policy is not, or not any more, to be put into effect."""
        if policy.identity is not self.policy.identity:
            await _close(policy)

    def _rules(self, policy: Policy) -> Rules:
        ids = self._secret if policy.salts is None else policy.salts.secret
        return Rules(
            identifier=policy.identity,
            limits=self._limits,
            salts=policy.salts,
            response_ids=None if policy.identity is None else ResponseIds(ids, secrets.token_bytes),
            queue=self._queue,
        )


async def _close(policy: Policy) -> None:
    if policy.identity is not None:
        await policy.identity.__aexit__(None, None, None)


def _standings(config: Config) -> Mapping[str, Standing]:
    tenants = () if config.access is None else config.access.tenants
    return {each.name: Standing(each.weight, each.priority) for each in tenants}


def check_secrets(config: Config) -> None:
    """Read every key and secret that the configuration names, as a start would. Raises `ConfigError`."""
    for each in key_places(config):
        each.read()
    access = config.access
    if access is not None and access.keys_file is not None:
        read_keys(access.keys_file, access.limits)
    if access is not None and access.isolation is not None:
        salts(access.isolation)


def salts(config: IsolationConfig) -> Salts:
    """The salts of all tenants. Raises `ConfigError` when the secret cannot be read, or is too short."""
    path = "$.access.isolation.secret"
    where = place(config.secret_file, config.secret_env, path)
    secret = "" if where is None else where.read().reveal()
    if len(secret) < MIN_SECRET_CHARS:
        raise ConfigError(path, f"expected a secret of at least {MIN_SECRET_CHARS} characters")
    return Salts(secret)
