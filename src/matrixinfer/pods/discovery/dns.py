"""Pods behind a DNS name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final, NamedTuple

from matrixinfer.config import CLUSTER_SUFFIX, DnsSource, PodConfig, name_server
from matrixinfer.config.discovery import MAX_PODS
from matrixinfer.errors import MatrixInferError
from matrixinfer.pods.discovery.source import Fail, Publish

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver

MIN_SECONDS: Final = 1.0
"""Shortest time between two questions, whatever the time to live."""
EMPTY_ANSWERS: Final = 3
"""A name is believed to have no records when so many answers in a row say so: servers say it while they restart, too."""
_HOST: Final = re.compile(r"[A-Za-z0-9._:-]+")
"""DNS allows every byte in a name; in a URL, others would mean something else."""


class DnsFailure(MatrixInferError):
    """The question was not answered; the message says why."""


class Answer(NamedTuple):
    """The addresses of pods, as (host, port), and how long they may be kept."""

    hosts: tuple[tuple[str, int], ...]
    seconds: float


class DnsPods:
    """Asks again and again. A question that fails leaves the last answer as it is."""

    def __init__(self, config: DnsSource) -> None:
        self._config = config
        self._known: dict[str, tuple[tuple[str, int], ...]] = {}
        """The last answer for each type of record."""

    async def watch(self, publish: Publish, fail: Fail) -> None:
        """Publish the pods at once, and after every answer."""
        resolver = self._resolver()
        empty, has_pods = 0, False
        while True:
            pause = self._config.interval_seconds
            try:
                answer = await self._ask(resolver)
            except DnsFailure as error:
                fail(str(error))
                pause = min(pause, max(MIN_SECONDS, pause / 2))
            else:
                empty = 0 if answer.hosts else empty + 1
                pause = max(MIN_SECONDS, min(pause, answer.seconds))
                if answer.hosts or not has_pods or empty >= EMPTY_ANSWERS:
                    has_pods = bool(answer.hosts)
                    publish(self._pods(answer.hosts))
            await asyncio.sleep(pause)

    def _resolver(self) -> Resolver:
        from dns.asyncresolver import Resolver  # noqa: PLC0415 - a tenth of a second, for those who use it

        servers = [name_server(each, path="nameservers") for each in self._config.nameservers]
        resolver = Resolver(configure=not servers)
        if servers:
            resolver.nameservers = [host for host, _ in servers]
            resolver.nameserver_ports = dict(servers)
        return resolver

    async def _ask(self, resolver: Resolver) -> Answer:
        """All records. Raises `DnsFailure` when no type of record was answered."""
        types = ("SRV",) if self._config.type == "srv" else ("A", "AAAA")
        found = await asyncio.gather(*(self._records(resolver, each) for each in types), return_exceptions=True)
        answers = [each for each in found if isinstance(each, Answer)]
        if not answers:
            failure = next(each for each in found if isinstance(each, BaseException))
            raise failure
        for kind, each in zip(types, found, strict=True):
            if isinstance(each, Answer):
                self._known[kind] = each.hosts
        hosts = sorted({host for kind in types for host in self._known.get(kind, ())})
        return Answer(tuple(hosts[:MAX_PODS]), min(each.seconds for each in answers))

    async def _records(self, resolver: Resolver, kind: str) -> Answer:
        from dns.exception import DNSException  # noqa: PLC0415
        from dns.resolver import NXDOMAIN, NoAnswer  # noqa: PLC0415

        interval, name = self._config.interval_seconds, self._config.name
        try:
            async with asyncio.timeout(2 * self._config.timeout_seconds):
                answer = await resolver.resolve(name, kind, lifetime=self._config.timeout_seconds)
        except (NXDOMAIN, NoAnswer):
            return Answer((), interval)
        except (DNSException, OSError) as error:  # a `TimeoutError` is one
            raise DnsFailure(f"{name} {kind}: {str(error) or 'no answer in time'}") from error
        hosts: list[tuple[str, int]] = []
        for record in answer:
            if kind == "SRV":
                hosts.append((record.target.to_text(omit_final_dot=True), record.port))
            else:
                hosts.append((record.address, self._config.port or 0))
        ttl = answer.rrset.ttl if answer.rrset is not None else interval
        named = tuple((host, port) for host, port in hosts if host.strip("."))  # `.` says that there is no such service
        usable = tuple((host, port) for host, port in named if port and _HOST.fullmatch(host))
        if named and not usable:
            raise DnsFailure(f"{name} {kind}: expected hosts and ports, got `{named[0][0][:100]}` port {named[0][1]}")
        return Answer(usable, ttl)

    def _pods(self, hosts: Sequence[tuple[str, int]]) -> tuple[PodConfig, ...]:
        scheme, kv_events = self._config.scheme, self._config.kv_events
        return tuple(
            PodConfig(
                name=f"{_bracketed(host.removesuffix(CLUSTER_SUFFIX))}:{port}",
                url=f"{scheme}://{_bracketed(host)}:{port}",
                kv_events=kv_events,
            )
            for host, port in hosts
        )


def _bracketed(host: str) -> str:
    try:
        return f"[{host}]" if isinstance(ip_address(host), IPv6Address) else host
    except ValueError:
        return host
