"""Assertions that say what was expected, wherever they run: pytest rewrites only the asserts of test modules."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def expect(condition: bool, message: str) -> None:
    """Raise `AssertionError` with `message` unless `condition` holds."""
    if not condition:
        raise AssertionError(message)


def expect_equal(got: T, expected: T, what: str) -> None:
    """Raise `AssertionError` unless both are equal. `what` says what was compared."""
    expect(got == expected, f"{what}: expected {expected!r}, got {got!r}")
