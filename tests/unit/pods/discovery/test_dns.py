"""Pods behind a name, over real sockets, while the name server fails in every way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import dns.rcode
import pytest

from matrixinfer.config import DnsSource, PodConfig
from matrixinfer.pods.discovery import dns as dns_pods
from matrixinfer.pods.discovery.dns import EMPTY_ANSWERS, DnsPods
from matrixinfer.tasks import cancel_and_wait
from tests.name_server import NameServer, name_server
from tests.waiting import eventually


class Seen:
    def __init__(self, server: NameServer) -> None:
        self.server = server
        self.lists: list[dict[str, str]] = []
        self.failures: list[str] = []

    def publish(self, pods: Sequence[PodConfig]) -> None:
        self.lists.append({pod.name: pod.url for pod in pods})

    async def last_is(self, **urls: str) -> None:
        await eventually(lambda: self.lists[-1:] == [urls])


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_pods, "MIN_SECONDS", 0.02)


@asynccontextmanager
async def watching(records: dict[str, list[str]], **config: Any) -> AsyncIterator[Seen]:
    async with name_server() as server:
        server.records = records
        source = DnsSource(
            name="engines.test", interval_seconds=0.05, timeout_seconds=5.0, nameservers=(server.address,), **config
        )
        seen = Seen(server)
        task = asyncio.create_task(DnsPods(source).watch(seen.publish, seen.failures.append))
        try:
            yield seen
        finally:
            await cancel_and_wait(task)


async def test_every_address_is_a_pod() -> None:
    async with watching({"A": ["10.0.0.2", "10.0.0.1"], "AAAA": ["fd00::1"]}, port=8000) as seen:
        urls = {
            "10.0.0.1:8000": "http://10.0.0.1:8000",
            "10.0.0.2:8000": "http://10.0.0.2:8000",
            "[fd00::1]:8000": "http://[fd00::1]:8000",
        }
        await eventually(lambda: seen.lists[-1:] == [urls])
        assert all(len(each) == 3 for each in seen.lists)


async def test_every_srv_record_is_a_pod() -> None:
    records = {"SRV": ["0 0 8000 a.engines.default.svc.cluster.local.", "10 5 8001 b.example."]}
    async with watching(records, type="srv", scheme="https", kv_events="none") as seen:
        urls = {
            "a.engines.default:8000": "https://a.engines.default.svc.cluster.local:8000",
            "b.example:8001": "https://b.example:8001",
        }
        await eventually(lambda: seen.lists[-1:] == [urls])
        assert set(seen.server.asked) == {"SRV"}


async def test_names_that_are_no_hosts_are_no_pods() -> None:
    odd = [r"0 0 80 a\032b.example.", r"0 0 80 user\@evil.example.", "0 0 80 evil/path.example.", "0 0 80 a#b.example."]
    async with watching({"SRV": [*odd, "0 0 0 c.example.", "0 0 80 d_1.example."]}, type="srv") as seen:
        await eventually(lambda: seen.lists[-1:] == [{"d_1.example:80": "http://d_1.example:80"}])
        seen.server.records = {"SRV": odd}
        await eventually(lambda: any("expected hosts and ports" in each for each in seen.failures))
        assert all(list(each) == ["d_1.example:80"] for each in seen.lists)
        seen.server.records = {"SRV": ["0 0 80 ."]}
        await eventually(lambda: seen.lists[-1:] == [{}])


async def test_pods_come_and_go_with_their_records() -> None:
    async with watching({"A": ["10.0.0.1"]}, port=1) as seen:
        await eventually(lambda: list(seen.lists[-1:]) == [{"10.0.0.1:1": "http://10.0.0.1:1"}])
        seen.server.records = {"A": ["10.0.0.2"]}
        await eventually(lambda: list(seen.lists[-1]) == ["10.0.0.2:1"])


async def test_an_answer_too_long_for_udp_is_read() -> None:
    async with watching({"A": [f"10.0.{i // 250}.{i % 250}" for i in range(1000)]}, port=1) as seen:
        await eventually(lambda: bool(seen.lists) and len(seen.lists[-1]) == 1000)


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED])
async def test_a_failure_keeps_the_last_answer(rcode: dns.rcode.Rcode) -> None:
    async with watching({"A": ["10.0.0.1"]}, port=1) as seen:
        await eventually(lambda: bool(seen.lists))
        seen.server.rcode = rcode
        await eventually(lambda: len(seen.failures) > 2, pause=0.05)
        assert all(list(each) == ["10.0.0.1:1"] for each in seen.lists)
        seen.server.rcode = dns.rcode.NOERROR
        seen.server.records = {"A": ["10.0.0.2"]}
        await eventually(lambda: list(seen.lists[-1]) == ["10.0.0.2:1"])


async def test_one_kind_of_record_that_is_not_answered_keeps_its_last_addresses() -> None:
    async with watching({"A": ["10.0.0.1"], "AAAA": ["fd00::1"]}, port=1) as seen:
        await eventually(lambda: bool(seen.lists) and len(seen.lists[-1]) == 2)
        seen.server.silent = {"AAAA"}
        seen.server.records["A"] = ["10.0.0.2"]
        await eventually(lambda: list(seen.lists[-1]) == ["10.0.0.2:1", "[fd00::1]:1"])


@pytest.mark.parametrize("rcode", [dns.rcode.NOERROR, dns.rcode.NXDOMAIN])
async def test_no_records_are_believed_once_they_are_said_again_and_again(rcode: dns.rcode.Rcode) -> None:
    async with watching({"A": ["10.0.0.1"]}, port=1) as seen:
        await eventually(lambda: bool(seen.lists))
        seen.server.asked.clear()
        seen.server.records, seen.server.rcode = {}, rcode
        await eventually(lambda: seen.lists[-1] == {})
        assert seen.server.asked.count("A") >= EMPTY_ANSWERS


async def test_a_short_time_to_live_is_kept_and_a_long_one_does_not_delay_the_next_question() -> None:
    async with watching({"A": ["10.0.0.1"]}, port=1) as seen:
        seen.server.ttl = 3600
        await eventually(lambda: seen.server.asked.count("A") > 3)
