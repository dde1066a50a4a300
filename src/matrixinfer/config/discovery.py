"""Where pods come from that the configuration does not list itself, and how they come and go."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from matrixinfer.config.base import Seconds, Section, described
from matrixinfer.errors import ConfigError

MAX_PODS = 4096
"""Most pods that one source may list."""


class FileSource(Section, frozen=True):
    """A file that lists pods. It is read again whenever it changes."""

    path: Annotated[
        str,
        described(
            "YAML or JSON file with a list of pods in the form of `pods[]`, relative to the config file. Replace it with "
            "a rename, so that it is never half written."
        ),
    ]
    interval_seconds: Annotated[Seconds, described("Time between two looks at the file.")] = 1.0

    @property
    def source(self) -> str:
        """Its name in logs, metrics and answers."""
        return f"file:{self.path}"


class DnsSource(Section, frozen=True):
    """A DNS name behind which pods are found."""

    name: Annotated[str, described("The name to ask for, such as a headless service of Kubernetes.")]
    type: Annotated[
        Literal["address", "srv"],
        described(
            "`address`: each A and AAAA record is a pod, named `address:port`. `srv`: each SRV record is a pod, named "
            "`target:port`; priorities and weights are not used."
        ),
    ] = "address"
    port: Annotated[
        Annotated[int, Meta(ge=1, le=65_535)] | None,
        described("Port of the engines' HTTP API. Needed with `address`; SRV records bring their own."),
    ] = None
    scheme: Annotated[Literal["http", "https"], described("How the engines are reached.")] = "http"
    kv_events: Annotated[
        Literal["discover", "none"], described("As `pods[].kvEvents`, for every pod that is found.")
    ] = "discover"
    interval_seconds: Annotated[
        Seconds,
        described(
            "Longest time between two questions. A shorter time to live of the answer is kept, down to a second."
        ),
    ] = 5.0
    timeout_seconds: Annotated[Seconds, described("Deadline of one question.")] = 2.0
    nameservers: Annotated[
        tuple[str, ...],
        described("Addresses of the name servers, with or without a port. By default those that the system uses."),
    ] = ()

    @property
    def source(self) -> str:
        """Its name in logs, metrics and answers."""
        return f"dns:{self.name}" if self.port is None else f"dns:{self.name}:{self.port}"


class DiscoveryConfig(Section, frozen=True):
    """Where further pods come from, and how pods come and go."""

    files: Annotated[tuple[FileSource, ...], described("Files that list pods.")] = ()
    dns: Annotated[tuple[DnsSource, ...], described("DNS names behind which pods are found.")] = ()
    start_empty: Annotated[
        bool,
        described(
            "Whether the gateway may start without a pod and a source, since pods will come by `POST /admin/pods`."
        ),
    ] = False
    drain_seconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described("How long `POST /admin/pods/NAME/drain` waits for the pod's requests before the pod is removed."),
    ] = 300.0
    slow_start_seconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described(
            "For this long after a pod came up beside others, its endpoints get at most a growing share of what the "
            "others have in flight, and at least one request at a time. 0 turns it off."
        ),
    ] = 30.0

    @property
    def sources(self) -> Sequence[FileSource | DnsSource]:
        """Every source, in the order of precedence."""
        return (*self.files, *self.dns)


def absolute_paths(config: DiscoveryConfig, base: Path) -> DiscoveryConfig:
    """The configuration with the paths of files made absolute."""
    files = tuple(
        msgspec.structs.replace(each, path=str((base / each.path).absolute())) if each.path else each
        for each in config.files
    )
    return msgspec.structs.replace(config, files=files)


def check_discovery(config: DiscoveryConfig) -> None:
    """Check what types cannot express. Raises `ConfigError`."""
    seen: dict[str, str] = {}
    groups: tuple[tuple[str, Sequence[FileSource | DnsSource]], ...] = (("files", config.files), ("dns", config.dns))
    for group, sources in groups:
        for i, each in enumerate(sources):
            path = f"$.discovery.{group}[{i}]"
            if each.source in seen:
                raise ConfigError(path, f"is the same source as {seen[each.source]}; remove one of them")
            seen[each.source] = path
            if isinstance(each, DnsSource):
                _check_dns(each, path)
            elif not each.path:
                raise ConfigError(f"{path}.path", "expected the path of a file, got an empty string")


def _check_dns(dns: DnsSource, path: str) -> None:
    if not dns.name.strip("."):
        raise ConfigError(f"{path}.name", f"expected a DNS name, got `{dns.name}`")
    if dns.type == "address" and dns.port is None:
        raise ConfigError(f"{path}.port", "expected the port of the engines: A and AAAA records have none")
    if dns.type == "srv" and dns.port is not None:
        raise ConfigError(f"{path}.port", "expected no port with `type: srv`: SRV records bring their own")
    for i, each in enumerate(dns.nameservers):
        name_server(each, path=f"{path}.nameservers[{i}]")


def name_server(text: str, *, path: str) -> tuple[str, int]:
    """The address and the port of a name server. Raises `ConfigError` at `path`."""
    bare = text.strip("[]")
    host, port = bare, "53"
    if (text.startswith("[") and "]:" in text) or text.count(":") == 1:
        host, _, port = text.rpartition(":")
        host = host.strip("[]")
    try:
        address = str(ip_address(host))
    except ValueError:
        address = ""
    if not address or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(path, f"expected an IP address, with or without a port, got `{text}`")
    return address, int(port)
