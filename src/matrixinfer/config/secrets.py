"""Secrets from a file or an environment variable. The configuration names only where they are, never what they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from matrixinfer.errors import ConfigError

MAX_BYTES = 16 * 1024
"""A longer file is no key."""
_KEY = re.compile(r"[\x21-\x7e]+")


class Secret:
    """A value that no log, error or representation shows."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself, for whoever must send it or compute with it."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret(…)"


class SecretPlace(NamedTuple):
    """Where a secret is: a file, else an environment variable. `path` is the path of the setting that names it."""

    file: str | None
    env: str | None
    path: str

    def read(self, environment: Mapping[str, str] = os.environ) -> Secret:
        """The secret, without white space around it. Raises `ConfigError`, which does not show it."""
        if self.file is not None:
            return self._checked(self._file_text(self.file), self._setting("File"), f"in {self.file}")
        name = self.env or ""
        value = environment.get(name)
        if value is None:
            raise ConfigError(self._setting("Env"), f"expected the environment variable `{name}` to be set")
        return self._checked(value, self._setting("Env"), f"in the environment variable `{name}`")

    def _setting(self, kind: str) -> str:
        return _setting(self.path, kind)

    def _file_text(self, file: str) -> str:
        try:
            with Path(file).open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
            return data.decode("ascii") if len(data) <= MAX_BYTES else ""
        except OSError as error:
            raise ConfigError(self._setting("File"), f"cannot read {file}: {error.strerror}") from error
        except UnicodeDecodeError:
            return ""

    def _checked(self, text: str, path: str, where: str) -> Secret:
        value = text.strip()
        if not _KEY.fullmatch(value):
            raise ConfigError(path, f"expected one line of printable ASCII without spaces {where}")
        return Secret(value)


def place(file: str | None, env: str | None, path: str) -> SecretPlace | None:
    """The place that two settings name; None if neither is set. Raises `ConfigError` if both are."""
    if file is not None and env is not None:
        raise ConfigError(_setting(path, "Env"), f"expected either this or `{_setting(path, 'File')}`, got both")
    return None if file is None and env is None else SecretPlace(file, env, path)


def _setting(path: str, kind: str) -> str:
    """The path of a key, or the name of an option."""
    return f"{path}-{kind.lower()}" if path.startswith("--") else f"{path}{kind}"
