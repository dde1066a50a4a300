"""The schema of TLS: certificates of the listeners, and which engines are trusted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from matrixinfer.config.base import Seconds, Section, described
from matrixinfer.errors import ConfigError

if TYPE_CHECKING:
    from matrixinfer.config.schema import Config


class ListenerTlsConfig(Section, frozen=True):
    """TLS of a listener. Files are read again when they change; relative paths start from the config file's folder."""

    cert_file: Annotated[str, described("The certificate with the chain below its root, in PEM.")]
    key_file: Annotated[str, described("Its private key in PEM, not encrypted.")]
    client_ca_file: Annotated[
        str | None,
        described("Certificates of the authorities whose clients are let in. `null` asks clients for no certificate."),
    ] = None
    min_version: Annotated[Literal["1.2", "1.3"], described("The oldest version of TLS that is spoken.")] = "1.2"
    reload_seconds: Annotated[Seconds, described("How often the files are looked at.")] = 10.0


class EngineTlsConfig(Section, frozen=True):
    """TLS to engines with `https` URLs. Relative paths start from the config file's folder."""

    ca_file: Annotated[str | None, described("Certificates to trust. By default, those that the system trusts.")] = None
    cert_file: Annotated[str | None, described("This client's certificate in PEM, where engines ask for one.")] = None
    key_file: Annotated[str | None, described("The key of this client's certificate.")] = None
    server_name: Annotated[
        str | None, described("The name that the engine's certificate must have. By default the host of its URL.")
    ] = None
    verify: Annotated[bool, described("Whether to check the engine's certificate and name.")] = True


def check_tls(config: Config) -> None:
    """Check what types cannot express. Raises `ConfigError`."""
    for path, section in _of_engines(config):
        check_engine_tls(section, path)
    if config.admin_tls is not None and config.admin is None:
        raise ConfigError("$.adminTls", "there is no admin listener (`admin` is null)")


def check_engine_tls(section: EngineTlsConfig, path: str) -> None:
    """Check what types cannot express. Raises `ConfigError`."""
    if (section.cert_file is None) != (section.key_file is None):
        raise ConfigError(f"{path}.keyFile", "expected `certFile` and `keyFile` together")
    if section.ca_file is not None and not section.verify:
        raise ConfigError(f"{path}.caFile", "is not used with `verify: false`; remove one of the two")


def _of_engines(config: Config) -> Iterator[tuple[str, EngineTlsConfig]]:
    if config.engine_tls is not None:
        yield "$.engineTls", config.engine_tls
    for i, pod in enumerate(config.pods):
        if pod.tls is not None:
            yield f"$.pods[{i}].tls", pod.tls
