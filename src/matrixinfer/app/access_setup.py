"""Builds what decides about access from the configuration."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from matrixinfer.access.admission import Admission
from matrixinfer.access.fair_queue import Standing
from matrixinfer.access.gate import Gate, Rules
from matrixinfer.access.identity import Identity, read_keys
from matrixinfer.access.limits import Limits
from matrixinfer.access.salts import MIN_SECRET_CHARS, Salts
from matrixinfer.access.shared import SharedLedger
from matrixinfer.config import Config
from matrixinfer.config.access import IsolationConfig
from matrixinfer.config.engine_keys import key_places
from matrixinfer.config.secrets import place
from matrixinfer.errors import ConfigError
from matrixinfer.index.redis.store import Store
from matrixinfer.telemetry.access_metrics import AccessMetrics


@asynccontextmanager
async def gate(config: Config, metrics: AccessMetrics, store: Store | None) -> AsyncIterator[Gate | None]:
    """The gate, while the context is open; None if everybody may send anything. Raises `ConfigError`."""
    access = config.access
    queue = _queue(config, metrics)
    if access is None:
        yield None if queue is None else Gate(Rules(queue=queue), metrics)
        return
    async with AsyncExitStack() as stack:
        shared = None if access.count_in == "local" or store is None else SharedLedger(store)
        deadline = store.config.deadline_seconds if store is not None else 1.0
        limits = Limits(shared, deadline_seconds=deadline, on_degraded=metrics.limits_degraded)
        rules = Rules(
            identifier=await stack.enter_async_context(Identity(access)),
            limits=await stack.enter_async_context(limits),
            salts=None if access.isolation is None else salts(access.isolation),
            queue=queue,
        )
        yield Gate(rules, metrics)


def _queue(config: Config, metrics: AccessMetrics) -> Admission | None:
    if config.admission is None:
        return None
    tenants = () if config.access is None else config.access.tenants
    return Admission(config.admission, {each.name: Standing(each.weight, each.priority) for each in tenants}, metrics)


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
