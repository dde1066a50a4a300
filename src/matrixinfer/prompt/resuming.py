"""Continues the rendering of a conversation where an earlier rendering of it has ended; see `resumable` for why it may."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from types import NoneType
from typing import Any, NamedTuple, TypeGuard

from jinja2 import Undefined
from jinja2.utils import Namespace, missing

VARIABLE = "0rendering"
"""The variable that holds the `Rendering`. No template can write its name."""
BEGUN, LOOKED = " begun", " looked"
"""Names of filters that no template can write."""
_SCALARS = frozenset({str, int, float, bool, NoneType})
_MAX_VALUES = 1000
"""Where more would have to be compared, or looked at, the loop runs as a whole."""


class Kept(NamedTuple):
    """A loop up to its last step, which a later rendering takes again."""

    items: list[Any]
    """All that it went through."""
    before: Sequence[Any]
    """What its steps could read when it began; of namespaces, what they held."""
    after: Sequence[Any]
    """What the namespaces among these held before the last step; None for others."""
    texts: list[str]
    """What it had written before the last step."""


class Rendering:
    """One rendering of a template, perhaps the continuation of an earlier one, whose loops are `earlier`."""

    __slots__ = (
        *("_begun", "_earlier", "_keep_at", "_known", "_number", "_read", "_skipped", "_start", "_step"),
        *("continued", "kept", "written"),
    )

    def __init__(self, earlier: dict[int, Kept] | None = None) -> None:
        self._earlier = earlier or {}
        self.kept: dict[int, Kept] = {}
        """The loops that a later rendering can continue, by number."""
        self.continued = 0
        """How many loops were continued."""
        self.written: list[str] = []
        """What was written so far."""
        # The rest is about the loop that is under way. Loops that ask a rendering do not nest.
        self._number = 0
        self._begun: Kept | None = None
        """The loop as it began."""
        self._read: Sequence[Any] = ()
        """What its steps can read."""
        self._start = 0
        """Where in `written` it began."""
        self._step = -1
        self._keep_at = -1
        """The step before which the loop is kept: the last one, or -1 if it is not to be kept."""
        self._skipped = 0
        """How many steps are skipped."""
        self._known = 0
        """How many texts these had written."""

    def begin(self, items: Any, number: int, is_counted: bool, read: Sequence[Any]) -> Any:
        """A loop over `items` begins, in which the variables `read` can be read. Returns the items that it goes through.

        `is_counted`: it reads its own state, so it must step over items that are skipped.
        """
        self._step = self._keep_at = -1
        self._skipped = self._known = 0
        spaces = [each for each in read if _is_namespace(each)]
        if type(items) is not list or len(items) < 2 or len(set(map(id, spaces))) < len(spaces):
            return items
        before = [_Held(each) if _is_namespace(each) else each for each in read]
        self._number, self._read, self._start = number, read, len(self.written)
        self._begun, self._keep_at = Kept(items, before, (), []), len(items) - 1
        earlier = self._earlier.get(number)
        if earlier is None or not begins_with(items, earlier.items) or not _are_same(before, earlier.before):
            return items
        self._continue(earlier)
        if is_counted:
            return items
        self._step = self._skipped - 1
        return items[self._skipped :]

    def _continue(self, earlier: Kept) -> None:
        """Put back what a loop had written, and what its namespaces held, before its last step."""
        self.continued += 1
        self.written += earlier.texts
        self._known = len(earlier.texts)
        for value, held in zip(self._read, earlier.after, strict=True):
            if _is_namespace(value):
                _attributes(value).update(held)
        self._skipped = len(earlier.items) - 1

    def __bool__(self) -> bool:
        """The next step of the loop begins. Returns whether it is skipped."""
        self._step += 1
        if self._step < self._skipped:
            return True
        if self._step == self._keep_at:
            self._keep()
        return False

    def _keep(self) -> None:
        after = [_Held(each) if _is_namespace(each) else None for each in self._read]
        if self._begun is not None and _is_plain(after):
            if self._known:
                new = self._start + self._known
                self.written[new:] = ["".join(self.written[new:])]
            self.kept[self._number] = self._begun._replace(after=after, texts=self.written[self._start :])

    def looked(self, index: Any) -> Any:
        """A step reads the item at `index`. If that may be another one in a longer conversation, nothing is kept."""
        if type(index) is not int or not 0 <= index <= self._step + 1:
            self._keep_at = -1
        return index


FILTERS = {
    BEGUN: lambda items, rendering, number, is_counted, *read: rendering.begin(items, number, is_counted, read),
    LOOKED: lambda index, rendering: rendering.looked(index),
}
"""The filters that `resumable` puts into templates."""


def begins_with(items: Sequence[object], beginning: Sequence[object]) -> bool:
    """Whether the first items are these very objects."""
    return len(items) >= len(beginning) and all(map(is_, beginning, items))


class _Held(dict[str, Any]):
    """What a namespace held at some time."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(_attributes(namespace))


def _is_namespace(value: object) -> TypeGuard[Namespace]:
    return issubclass(type(value), Namespace)  # `isinstance` asks a namespace for its attribute `__class__`


def _attributes(namespace: Namespace) -> dict[str, Any]:
    """The dict in which Jinja keeps what a namespace holds. It has no public name."""
    attributes: dict[str, Any] = object.__getattribute__(namespace, "_Namespace__attrs")
    return attributes


def _are_same(one: object, other: object) -> bool:
    """Whether two values are equal in all that a template can see of them."""
    waiting, left = [(one, other)], _MAX_VALUES
    while waiting:
        one, other = waiting.pop()
        left -= 1
        if one is other:
            continue
        if type(one) is not type(other) or left <= 0:
            return False
        inside, others = _values(one), _values(other)
        if inside is None or others is None:
            if not _is_same_value(one, other):
                return False
        elif len(inside) != len(others):
            return False
        else:
            waiting += zip(inside, others, strict=True)
    return True


def _values(value: Any) -> list[Any] | None:
    """What is in a container, its keys in their order included; None for other values."""
    kind = type(value)
    if kind is dict or kind is _Held:
        return [*value, *value.values()]
    return list(value) if kind is list or kind is tuple else None


def _is_same_value(one: object, other: object) -> bool:
    if isinstance(one, Undefined):
        return all(_origin(each) == _origin(one) and _origin(each)[1] is missing for each in (one, other))
    # Numbers may be equal and look different.
    return one == other if isinstance(one, str) else isinstance(one, int | float) and repr(one) == repr(other)


def _origin(undefined: object) -> Sequence[object]:
    """The name of what is undefined, and the object that does not have it."""
    return [object.__getattribute__(undefined, f"_undefined_{each}") for each in ("name", "obj")]


def _is_plain(value: object) -> bool:
    """Whether a value is made only of what no template can change."""
    waiting, left = [value], _MAX_VALUES
    while waiting:
        value = waiting.pop()
        left -= 1
        if type(value) in _SCALARS:
            continue
        inside = _values(value)
        if left <= 0 or (inside is None and not issubclass(type(value), Undefined)):
            return False
        waiting += inside or ()
    return True
