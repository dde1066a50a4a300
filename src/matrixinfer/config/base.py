"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from matrixinfer.config.complaints import explain
from matrixinfer.errors import ConfigError

T = TypeVar("T")

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]


def described(description: str) -> Meta:
    """Attach the description that the reference page shows for a field."""
    return Meta(description=description)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of every section: frozen, keyword-only, camelCase in YAML; unknown keys are errors."""


def convert(data: object, kind: type[T], *, path: str) -> T:
    """Turn plain YAML data into `kind`. Raises `ConfigError` whose path starts at `path`."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        where, message = explain(str(error), kind)
        raise ConfigError(path + where, message) from error
