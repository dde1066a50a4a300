"""Reads certificates and keys from files, with errors that name the setting."""

from __future__ import annotations

import ssl
from pathlib import Path

from matrixinfer.config.files import Stamp, stamp
from matrixinfer.errors import ConfigError


def load_pair(context: ssl.SSLContext, cert_file: str, key_file: str, path: str) -> None:
    """Load a certificate and its key; `path` is that of the section. Raises `ConfigError`."""
    for name, file in (("certFile", cert_file), ("keyFile", key_file)):
        _check_readable(file, f"{path}.{name}")
    try:
        context.load_cert_chain(cert_file, key_file, password=lambda: b"")  # else the terminal is asked for a password
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{path}.certFile",
            f"expected a certificate in {cert_file} and its unencrypted key in {key_file}, both in PEM: {error}",
        ) from error


def load_authorities(context: ssl.SSLContext, ca_file: str, path: str) -> None:
    """Trust the certificates in a file; `path` is that of the setting. Raises `ConfigError`."""
    _check_readable(ca_file, path)
    try:
        context.load_verify_locations(ca_file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(path, f"expected certificates in PEM in {ca_file}: {error}") from error


def stamps(*files: str | None) -> tuple[Stamp | None, ...]:
    """What changes when one of these files does, also by way of a link."""
    return tuple(stamp(file) for file in files if file is not None)


def _check_readable(file: str, path: str) -> None:
    try:
        with Path(file).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(path, f"cannot read {file}: {error.strerror}") from error
