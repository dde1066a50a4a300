"""Continues the rendering of a conversation where an earlier rendering of it has ended.

What a template writes for a message may depend on the messages that follow. So what it has written for the beginning of a
conversation need not be the beginning of what it writes for all of it. Whether it is, is proven here, for each template and
for each rendering. A loop over the messages takes one step for each of them:

- Before the loop, everything runs as always. All that a step can read is then the items of the loop and the variables that
  are named in the loop or in macros. These variables must be what they were in the earlier rendering, in value and in type,
  and namespaces must hold the same.
- A step can change nothing but namespaces: what else it assigns ends with it, and the sandbox lets it change no list or dict.
  What they held before the last step of the earlier rendering is kept, and put back.
- A step must not look further than to the next message. Of the state of its loop it may read only what follows from the
  items so far and the next one (`_LOOP_STATE`). Other messages it may read only by an index, which is checked each time
  (`Rendering.looked`).

So if the messages of the earlier rendering, as the same objects, are the first ones of this, then every step but its last
would write now what it wrote then, and these steps are skipped. A loop with anything else in it (a filter, a clock, chance,
blocks) runs as a whole, and so does one whose variables differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import is_
from types import NoneType
from typing import Any, NamedTuple, TypeGuard

from jinja2 import Environment, Undefined, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.utils import Namespace, missing

VARIABLE = "0rendering"
"""The variable of templates that has the `Rendering`. No template can write its name."""
_BEGUN, _LOOKED = " begun", " looked"
"""Names of filters that no template can write."""
_LOOP_STATE = frozenset({"index", "index0", "first", "last", "previtem", "nextitem"})
_UNSTEADY = frozenset({"cycler", "joiner", "lipsum"})
"""Functions whose results depend on more than their arguments."""
_CLOCK = "strftime_now"
"""Another one, which templates may call before the loops that are continued."""
_UNKNOWN = (
    *(nodes.Extends, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport),
    *(nodes.EvalContextModifier, nodes.ContextReference, nodes.DerivedContextReference),
)
_SCALARS = frozenset({str, int, float, bool, NoneType})
_MAX_VALUES = 1000
"""How many values are compared, or looked at, before a rendering is done as a whole."""


class Kept(NamedTuple):
    """A loop up to its last step."""

    items: list[Any]
    """All that it went through."""
    before: Sequence[Any]
    """What its steps could read when it began."""
    after: Sequence[Any]
    """What the namespaces among these held before the last step; None for others."""
    texts: list[str]
    """What it had written by then."""


class Rendering:
    """One rendering of a template, perhaps the continuation of an earlier one, whose loops are `earlier`."""

    __slots__ = (
        *("_at", "_earlier", "_known", "_last", "_loop", "_now", "_read", "_skipped", "_start"),
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
        self._loop = 0
        self._now: Kept | None = None
        """The loop that is under way, as it began."""
        self._read: Sequence[Any] = ()
        self._start = 0
        """Where in `written` it began."""
        self._at = self._last = -1
        """The current step, and the one before which the loop is kept, or -1."""
        self._skipped = self._known = 0
        """How many steps are skipped, and how many texts they had written."""

    def begin(self, items: Any, loop: int, is_counted: bool, read: Sequence[Any]) -> Any:
        """A loop over `items` begins, in which the variables `read` can be read. Returns the items that it goes through.

        `is_counted`: it reads its own state, so it must step over items that are skipped.
        """
        self._at = self._last = -1
        self._skipped = self._known = 0
        spaces = [each for each in read if _is_namespace(each)]
        if type(items) is not list or len(items) < 2 or len(set(map(id, spaces))) < len(spaces):
            return items
        before = [_Held(each) if _is_namespace(each) else each for each in read]
        self._loop, self._read, self._start = loop, read, len(self.written)
        self._now, self._last = Kept(items, before, (), []), len(items) - 1
        earlier = self._earlier.get(loop)
        if earlier is None or not begins_with(items, earlier.items) or not _are_same(before, earlier.before):
            return items
        self.continued += 1
        self.written += earlier.texts
        self._known = len(earlier.texts)
        for value, held in zip(read, earlier.after, strict=True):
            if _is_namespace(value):
                _attributes(value).update(held)
        self._skipped = len(earlier.items) - 1
        if is_counted:
            return items
        self._at = self._skipped - 1
        return items[self._skipped :]

    def __bool__(self) -> bool:
        """The next step of the loop begins. Returns whether it is skipped."""
        self._at += 1
        if self._at < self._skipped:
            return True
        if self._at == self._last:
            self._keep()
        return False

    def _keep(self) -> None:
        after = [_Held(each) if _is_namespace(each) else None for each in self._read]
        if self._now is not None and _is_plain(after):
            if self._known:
                new = self._start + self._known
                self.written[new:] = ["".join(self.written[new:])]
            self.kept[self._loop] = self._now._replace(after=after, texts=self.written[self._start :])

    def looked(self, index: Any) -> Any:
        """A step reads the item at `index`. If that may be another one in a longer conversation, nothing is kept."""
        if type(index) is not int or not 0 <= index <= self._at + 1:
            self._last = -1
        return index


FILTERS = {
    _BEGUN: lambda items, rendering, loop, is_counted, *read: rendering.begin(items, loop, is_counted, read),
    _LOOKED: lambda index, rendering: rendering.looked(index),
}
"""What `instrument` puts into templates."""


def begins_with(items: Sequence[object], beginning: Sequence[object]) -> bool:
    """Whether the first items are these very objects."""
    return len(items) >= len(beginning) and all(map(is_, beginning, items))


def instrument(tree: nodes.Template, environment: Environment) -> None:
    """Make the loops that can be continued ask the `Rendering` in `VARIABLE`. Changes `tree`."""
    if next(tree.find_all(_UNKNOWN), None) is not None or any(map(_is_unsteady, tree.find_all(nodes.Expr))):
        return
    clocks = [each for each in tree.find_all(nodes.Name) if each.name == _CLOCK]
    called = {id(each.node) for each in tree.find_all(nodes.Call)}
    used = called | {id(each.node) for each in tree.find_all(nodes.Test)}
    if not all(id(clock) in used for clock in clocks):
        return
    macros = list(tree.find_all(nodes.Macro))
    if any(macro not in tree.body for macro in macros) or len({macro.name for macro in macros}) < len(macros):
        return
    for number, loop in enumerate(_loops(tree.body)):
        read = _read_by(loop, macros, environment)
        if read is not None and read.isdisjoint(_stored_after(loop, tree)):
            _instrument(loop, number, sorted(read))
    tree.set_environment(environment)


def _is_unsteady(node: nodes.Expr) -> bool:
    """Whether an expression may have another value with the same variables."""
    if isinstance(node, nodes.Filter):
        return node.name == "random"
    if isinstance(node, nodes.Test) and node.name == "sameas":  # values that are equal may be other objects
        return not all(isinstance(each, nodes.Const) and each.value in (None, True, False) for each in node.args)
    return isinstance(node, nodes.Name) and node.name in _UNSTEADY


def _loops(body: Iterable[nodes.Node]) -> Iterator[nodes.For]:
    """The loops that run once at most, and not within anything that has variables of its own."""
    for node in body:
        if isinstance(node, nodes.For):
            yield node
        elif isinstance(node, nodes.If):
            yield from _loops([*node.body, *node.elif_, *node.else_])


def _read_by(loop: nodes.For, macros: Sequence[nodes.Macro], environment: Environment) -> set[str] | None:
    """The variables from outside that a step of the loop may read, but for the items; None if it cannot be continued."""
    if loop.test is not None or loop.else_ or loop.recursive or not all(map(_is_steady_loop, _own(loop.body))):
        return None
    parts: list[nodes.Node] = [*macros, nodes.For(loop.target, nodes.List([]), loop.body, [], None, False)]
    alone = nodes.Template(parts)
    alone.set_environment(environment)
    read = find_undeclared_variables(alone) | {each.name for each in alone.find_all(nodes.NSRef)}
    names = {each.name for each in alone.find_all(nodes.Name)}
    items = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
    if _CLOCK in names:
        return None
    if items in names:
        uses = sum(each.name == items for part in parts for each in part.find_all(nodes.Name))
        if uses != len(_indexed(loop, items)):
            return None
        read.discard(items)
    return read | names.intersection(environment.globals)


def _own(body: Iterable[nodes.Node]) -> Iterator[nodes.Node]:
    """The nodes in which `loop` is the state of the loop with this body, each with its parent's other children."""
    for node in body:
        yield node
        inside = node.iter_child_nodes(exclude=("body",)) if isinstance(node, nodes.For) else node.iter_child_nodes()
        yield from _own(inside)


def _is_steady_loop(node: nodes.Node) -> bool:
    """Whether what a node itself reads of the loop's state follows from the items so far and the next one."""
    if isinstance(node, nodes.Getattr) and _is_loop(node.node):
        return node.attr in _LOOP_STATE
    return not any(map(_is_loop, node.iter_child_nodes()))


def _is_loop(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _indexed(loop: nodes.For, items: str | None) -> list[nodes.Getitem]:
    """Where a step reads one of the items by an index."""
    return [
        each
        for part in loop.body
        for each in (*([part] if isinstance(part, nodes.Getitem) else []), *part.find_all(nodes.Getitem))
        if isinstance(each.node, nodes.Name)
        and each.node.name == items
        and each.ctx == "load"
        and not isinstance(each.arg, nodes.Slice)
    ]


def _stored_after(loop: nodes.For, tree: nodes.Template) -> set[str]:
    """Names that are assigned behind the loop: to name them in front of it would change what they are there."""
    stored: set[str] = set()
    passed = False

    def walk(node: nodes.Node) -> None:
        nonlocal passed
        for child in node.iter_child_nodes():
            if child is loop:
                passed = True
                continue
            if passed and isinstance(child, nodes.Name) and child.ctx == "store":
                stored.add(child.name)
            if passed and isinstance(child, nodes.Macro):
                stored.add(child.name)
            walk(child)

    walk(tree)
    return stored


def _instrument(loop: nodes.For, number: int, read: Sequence[str]) -> None:
    line = loop.lineno
    is_counted = any(map(_is_loop, _own(loop.body)))
    items = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
    rendering = nodes.Name(VARIABLE, "load", lineno=line)
    for each in _indexed(loop, items):
        each.arg = nodes.Filter(each.arg, _LOOKED, [rendering], [], None, None, lineno=line)
    arguments = [rendering, nodes.Const(number), nodes.Const(is_counted), *(nodes.Name(each, "load") for each in read)]
    loop.iter = nodes.Filter(loop.iter, _BEGUN, arguments, [], None, None, lineno=line)
    loop.body.insert(0, nodes.If(rendering, [nodes.Continue(lineno=line)], [], [], lineno=line))


class _Held(dict[str, Any]):
    """What a namespace held at some time."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(_attributes(namespace))


def _is_namespace(value: object) -> TypeGuard[Namespace]:
    return issubclass(type(value), Namespace)  # `isinstance` asks a namespace for its attribute `__class__`


def _attributes(namespace: Namespace) -> dict[str, Any]:
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
    """What is in a container, its keys in their order included; None if it is none."""
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
    """The name of what is undefined, and in what."""
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
