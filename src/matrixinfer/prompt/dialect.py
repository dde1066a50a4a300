"""How engines differ in what they make of the same chat: their kind, and the versions that changed something."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import lru_cache
from typing import Protocol

SGLANG = "sglang"
"""The owner of SGLang's models, as its `/v1/models` names it."""


class Dialect(Enum):
    """Engines that render chats alike. The values are for messages. Text prompts are the same for all of them."""

    VLLM = "vLLM 0.33 or later"
    VLLM_31 = "vLLM 0.31 or 0.32"
    VLLM_30 = "vLLM 0.30"
    VLLM_24 = "vLLM 0.24 to 0.29"
    VLLM_OLD = "vLLM before 0.24"
    VLLM_UNKNOWN = "vLLM of unknown version"
    SGLANG = "SGLang 0.5.23 or later"
    SGLANG_18 = "SGLang 0.5.18 to 0.5.22"
    SGLANG_OLD = "SGLang before 0.5.18"
    SGLANG_UNKNOWN = "SGLang of unknown version"

    __hash__ = object.__hash__  # every request asks for members of sets

    @property
    def is_sglang(self) -> bool:
        """Whether the engines are SGLang's; every other kind is taken for vLLM's."""
        return self in _SGLANG


_SGLANG = frozenset({Dialect.SGLANG, Dialect.SGLANG_18, Dialect.SGLANG_OLD, Dialect.SGLANG_UNKNOWN})
_VLLM_FROM = (
    ((0, 33), Dialect.VLLM),
    ((0, 31), Dialect.VLLM_31),
    ((0, 30), Dialect.VLLM_30),
    ((0, 24), Dialect.VLLM_24),
    ((0,), Dialect.VLLM_OLD),
)
_SGLANG_FROM = (((0, 5, 23), Dialect.SGLANG), ((0, 5, 18), Dialect.SGLANG_18), ((0,), Dialect.SGLANG_OLD))
_FIRST = (0, 4)
"""Lower numbers are those of builds from source, which do not say what they were built from."""
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)")


class Engine(Protocol):
    """An engine that serves a model."""

    @property
    def engine(self) -> str | None:
        """The engine's own name of its kind, such as `vllm`; None until it has reported it."""
        ...

    @property
    def version(self) -> str | None:
        """The engine's version; None if it does not report it."""
        ...


@lru_cache(maxsize=256)
def dialect_of(engine: str | None, version: str | None) -> Dialect:
    """The dialect of an engine by the name of its kind and its version."""
    found = _VERSION.match(version or "")
    number = tuple(int(part) for part in found[1].split(".")) if found else ()
    if number < _FIRST:
        return Dialect.SGLANG_UNKNOWN if engine == SGLANG else Dialect.VLLM_UNKNOWN
    return next(dialect for first, dialect in (_SGLANG_FROM if engine == SGLANG else _VLLM_FROM) if number >= first)


def dialects_of(engines: Iterable[Engine]) -> list[Dialect]:
    """The dialects that `engines` speak, each once."""
    kinds = dict.fromkeys([(each.engine, each.version) for each in engines])
    return list(dict.fromkeys(dialect_of(*kind) for kind in kinds))


class Dialects:
    """Remembers the dialects of the engines that were asked about last, if they were given as a tuple.

    A tuple that is given again must hold the same engines, of the same kind and version, as before.
    """

    def __init__(self) -> None:
        self._engines: Sequence[Engine] = ()
        self._dialects: Sequence[Dialect] = ()

    def of(self, engines: Sequence[Engine]) -> Sequence[Dialect]:
        """The dialects that `engines` speak, each once."""
        if engines is not self._engines or not isinstance(engines, tuple):
            self._engines, self._dialects = engines, dialects_of(engines)
        return self._dialects
