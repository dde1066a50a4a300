"""Checks what callers of the library pass in, before anything changes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import index
from typing import Any, SupportsIndex

from matrixinfer.config.endpoint_names import EndpointName
from matrixinfer.errors import ConfigError, InvalidRequest
from matrixinfer.scheduler.framework import Candidate

_NUMBERS = 1 << 64


def text(value: str, param: str) -> str:
    """A text, such as a model's name."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{param}: expected a text, got {type(value).__name__}", param=param)
    return value


def pod_name(value: str) -> str:
    """The name of a pod, or of a rank of it."""
    tier = EndpointName.parse(text(value, "pod")).tier
    if tier is not None:
        raise InvalidRequest(f"pod: expected a name that does not end with `~{tier}`, got `{value}`", param="pod")
    return value


def count(value: int, name: str, *, least: int) -> int:
    """A setting. Raises `ConfigError`."""
    try:
        number = index(value)
    except TypeError as error:
        raise ConfigError("Index", f"{name} must be a number, got {type(value).__name__}") from error
    if number < least:
        raise ConfigError("Index", f"{name} must be at least {least}, got {number}")
    return number


def frame(seq: int, payload: bytes) -> tuple[int, bytes]:
    """A frame's number and payload. Any integer and any buffer of bytes will do."""
    try:
        number = index(seq)
        data = payload if type(payload) is bytes else bytes(memoryview(payload))
    except TypeError as error:
        raise InvalidRequest(f"frame: expected a number and bytes: {error}", param="frame") from error
    if not 0 <= number < _NUMBERS:
        raise InvalidRequest(f"frame: expected a number of 64 bits, got {number}", param="frame")
    return number, data


def frames(given: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The frames of an answer, each checked when it is its turn."""
    if not isinstance(given, Iterable):
        raise InvalidRequest(f"frames: expected pairs of number and payload, got {type(given).__name__}")
    for each in given:
        try:
            seq, payload = each
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"frames: expected pairs of number and payload: {error}", param="frames") from error
        yield frame(seq, payload)


def candidates(given: Iterable[Candidate | str]) -> list[Candidate]:
    """Candidates, of which some may be given by name alone. Each name comes once."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InvalidRequest(f"candidates: expected a list, got {type(given).__name__}", param="candidates")
    found: list[Any] = [Candidate(name=each, url="") if isinstance(each, str) else each for each in given]
    for each in found:
        if not _is_candidate(each):
            raise InvalidRequest(
                f"candidates: expected names, or candidates with a name and numbers, got {each!r}", param="candidates"
            )
    if len({each.name for each in found}) != len(found):
        raise InvalidRequest("candidates: expected each name once", param="candidates")
    return found


def _is_candidate(value: object) -> bool:
    if not isinstance(value, Candidate):
        return False
    names: list[object] = [value.name]
    numbers: list[object] = [value.in_flight, value.queued_tokens]
    return all(isinstance(each, str) for each in names) and all(isinstance(each, SupportsIndex) for each in numbers)
