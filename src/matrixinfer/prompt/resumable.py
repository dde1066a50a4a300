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
would write now what it wrote then, and these steps are skipped. A loop with anything else in it (a condition, a clock, chance,
blocks) runs as a whole, and so does one whose variables differ.

A loop that can be continued is compiled as if the template said this, where `begun`, `looked` and `rendering` have names
that no template can write:

    {% for m in messages | begun(rendering, 0, true, ns, x) %}  first loop; it reads `loop`; steps may read `ns` and `x`
        {% if rendering %}{% continue %}{% endif %}             true for steps that are skipped
        {{ messages[(loop.index0 - 1) | looked(rendering)] }}   checks the index
    {% endfor %}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jinja2 import Environment, nodes
from jinja2.meta import find_undeclared_variables

from matrixinfer.prompt.resuming import BEGUN, LOOKED, VARIABLE

_LOOP_STATE = frozenset({"index", "index0", "first", "last", "previtem", "nextitem"})
_UNSTEADY = frozenset({"cycler", "joiner", "lipsum"})
"""Functions whose results depend on more than their arguments."""
_CLOCK = "strftime_now"
"""Another one, which templates may call before the loops that are continued."""
_UNKNOWN = (
    *(nodes.Extends, nodes.Block, nodes.Include, nodes.Import, nodes.FromImport),
    *(nodes.EvalContextModifier, nodes.ContextReference, nodes.DerivedContextReference),
)


def instrument(tree: nodes.Template, environment: Environment) -> None:
    """Make the loops that can be continued ask the `Rendering` in `VARIABLE`. Changes `tree`."""
    macros = list(tree.find_all(nodes.Macro))
    if not _is_steady(tree) or not _are_unique(macros, tree):
        return
    for number, loop in enumerate(_loops(tree.body)):
        read = _read_by(loop, macros, environment)
        if read is not None and read.isdisjoint(_stored_after(loop, tree)):
            _instrument(loop, number, sorted(read))
    tree.set_environment(environment)


def _is_steady(tree: nodes.Template) -> bool:
    """Whether all that the template reads are its variables, and a clock that it calls, or tests, by the clock's own name."""
    if next(tree.find_all(_UNKNOWN), None) is not None or any(map(_is_unsteady, tree.find_all(nodes.Expr))):
        return False
    used = {id(each.node) for each in tree.find_all(nodes.Call)} | {id(each.node) for each in tree.find_all(nodes.Test)}
    return all(id(each) in used for each in tree.find_all(nodes.Name) if each.name == _CLOCK)


def _are_unique(macros: Sequence[nodes.Macro], tree: nodes.Template) -> bool:
    """Whether each macro is always there, and nothing else ever has its name."""
    names = {each.name for each in macros}
    stored = {each.name for each in tree.find_all(nodes.Name) if each.ctx != "load"}
    return all(each in tree.body for each in macros) and len(names) == len(macros) and names.isdisjoint(stored)


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
    # A template of these alone: what it does not set itself, it reads from outside.
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
    """The nodes of a loop's body in which `loop` is the state of that loop: not the bodies of loops within it."""
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
        for each in part.find_all(nodes.Getitem)
        if isinstance(each.node, nodes.Name)
        and each.node.name == items
        and each.ctx == "load"
        and not isinstance(each.arg, nodes.Slice)
    ]


def _stored_after(loop: nodes.For, tree: nodes.Template) -> set[str]:
    """Names that are assigned after the loop. To name them in front of it would change what they are there."""
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
    """Make one loop ask the `Rendering`, as the module's docstring shows."""
    line = loop.lineno
    is_counted = any(map(_is_loop, _own(loop.body)))
    items = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
    rendering = nodes.Name(VARIABLE, "load", lineno=line)
    for each in _indexed(loop, items):
        each.arg = nodes.Filter(each.arg, LOOKED, [rendering], [], None, None, lineno=line)
    arguments = [rendering, nodes.Const(number), nodes.Const(is_counted), *(nodes.Name(each, "load") for each in read)]
    loop.iter = nodes.Filter(loop.iter, BEGUN, arguments, [], None, None, lineno=line)
    loop.body.insert(0, nodes.If(rendering, [nodes.Continue(lineno=line)], [], [], lineno=line))
