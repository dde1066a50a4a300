from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from joserfc import jwk

from matrixinfer.access import key_source
from matrixinfer.access.key_source import KeySource, NotFetched, from_file
from matrixinfer.access.tokens import Tokens, UnknownKey
from matrixinfer.config.access import JwtConfig, QuotaConfig
from matrixinfer.errors import KeysUnavailable
from tests.unit.access.test_tokens import document, token
from tests.waiting import eventually

OLD, NEW = (jwk.ECKey.generate_key("P-256", {"kid": name}) for name in ("old", "new"))
CONFIG = JwtConfig(issuer="https://idp", audience=("gateway",), jwks_file="x", keep_seconds=1000, refresh_seconds=3600)


@dataclass
class Provider:
    """Answers with its document, or fails without one."""

    data: bytes | None
    asked: int = 0
    now: float = 0.0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def fetch(self) -> bytes:
        self.asked += 1
        await self.gate.wait()
        if self.data is None:
            raise NotFetched("it is down")
        return self.data


def source(provider: Provider, config: JwtConfig = CONFIG) -> tuple[KeySource, Tokens]:
    tokens = Tokens(config, QuotaConfig(), lambda: 1_000_000.0)
    return KeySource(config, tokens, provider.fetch, lambda: provider.now), tokens


async def test_a_token_with_a_new_key_makes_the_keys_be_read_once() -> None:
    provider = Provider(document(OLD))
    keys, tokens = source(provider)
    async with keys:
        provider.now = 100.0
        provider.data = document(OLD, NEW)
        provider.gate.clear()
        asking = [asyncio.create_task(keys.renew()) for _ in range(20)]
        await asyncio.sleep(0)
        provider.gate.set()
        await asyncio.gather(*asking)
        assert provider.asked == 2
        assert tokens.check(token(NEW, kid="new")).name == "alice"
        provider.now += key_source.PAUSE_SECONDS - 1
        for _ in range(5):  # whoever invents names of keys
            await keys.renew()
        assert provider.asked == 2


async def test_keys_are_believed_for_a_while_when_they_cannot_be_read() -> None:
    provider = Provider(document(OLD))
    keys, tokens = source(provider)
    async with keys:
        provider.data = None
        provider.now = 900.0
        await keys.renew()
        keys.check()
        assert tokens.check(token(OLD, kid="old")).name == "alice"
        provider.now = 1001.0
        with pytest.raises(KeysUnavailable):
            keys.check()


@pytest.mark.parametrize("answer", [None, b"not JSON"])
async def test_a_provider_that_is_down_at_the_start_is_asked_again(
    answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_source, "RETRY_SECONDS", 0.001)
    provider = Provider(answer)
    keys, tokens = source(provider)
    async with keys:
        with pytest.raises(KeysUnavailable):
            keys.check()
        provider.data = document(OLD)

        def is_known() -> bool:
            try:
                tokens.check(token(OLD, kid="old"))
            except UnknownKey:
                return False
            return True

        await eventually(is_known)
        keys.check()


async def test_keys_are_read_again_from_time_to_time() -> None:
    provider = Provider(document(OLD))
    keys, _ = source(provider, JwtConfig(issuer="i", audience=("a",), jwks_file="x", refresh_seconds=0.001))
    async with keys:
        await eventually(lambda: provider.asked > 3)


async def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    fetch: Callable[[], Awaitable[bytes]] = from_file(str(file))
    with pytest.raises(NotFetched):
        await fetch()
    file.write_bytes(document(OLD))
    assert await fetch() == document(OLD)
