"""A configuration as data that may be shown: without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

HIDDEN = "(hidden)"
_SECRET = re.compile(r"(password|secret|token|api_?key|passphrase|salt)s?$|^key$", re.IGNORECASE)
"""Names of keys whose values are not shown. Names of files and of variables that hold a secret end otherwise."""


def shown(config: msgspec.Struct) -> Any:
    """All keys with the values in effect, in plain types; secrets are hidden."""
    return _shown(msgspec.to_builtins(config))


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: HIDDEN if each and is_secret(str(key), each) else _shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return value


def is_secret(key: str, value: object) -> bool:
    """Whether the value of a key is not shown. Numbers and flags are no secrets: `maxPrefixTokens` is a count."""
    return isinstance(value, str | list | Mapping) and _SECRET.search(key) is not None
