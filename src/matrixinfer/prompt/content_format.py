"""Detects which form of message content a chat template expects.

Engines inspect the template to decide how they pass `content`: as a list of parts to a template that loops over a
message's content, as one string to any other. Token ids are exact only if the gateway decides in the same way, so this
follows the rules of vLLM and SGLang, including what confuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jinja2 import nodes

_MEDIA_WORDS = ("image", "audio", "video", "vision")
"""SGLang passes parts to every template whose source contains one of these words."""

_SGLANG_NAMES = frozenset({"message", "msg", "m"})
"""The names of a message that SGLang looks for."""


class _ConfusedError(Exception):
    """The template has a form on which vLLM's inspection fails; it then passes strings."""


def vllm_passes_parts(template: nodes.Template, *, macros: bool = True, namespaces: bool = True) -> bool:
    """Whether vLLM passes content as a list of parts: the template loops over the content of an item of `messages`.

    Names are tracked through assignments, filters, tests and slices, with `macros` (vLLM from 0.30 on) through the
    parameters of macros and with `namespaces` (from 0.33 on) through attributes of namespaces. A loop over any variable
    called `content` counts, too, but with `macros` only outside of macros.
    """
    try:
        lists = _aliases(template, "messages", namespaces=namespaces)
        items = {_target(loop) for loop in template.find_all(nodes.For) if _name(_source(loop.iter)) in lists}
        return any(_target(loop) for loop in _content_loops(template, items, macros=macros))
    except _ConfusedError:
        return False


def sglang_passes_parts(source: str, template: nodes.Template) -> bool:
    """Whether SGLang passes content as a list of parts: it looks for words in the source, and for names of loops."""
    if any(word in source for word in _MEDIA_WORDS):
        return True
    return any(_content_owner(_source(loop.iter)) in _SGLANG_NAMES for loop in template.find_all(nodes.For))


def _aliases(template: nodes.Template, name: str, *, namespaces: bool) -> set[str]:
    """`name` and every variable, or attribute of a namespace, assigned from it, directly or indirectly."""
    assignments = list(template.find_all(nodes.Assign))
    names: set[str] = set()
    more = {name}
    while more > names:
        names = more
        more = names | {
            alias for each in assignments for alias in _assigned(each, _is_one_of(names), namespaces=namespaces)
        }
    return names


def _is_one_of(names: set[str]) -> Callable[[nodes.Node | None], bool]:
    return lambda node: _name(_source(node)) in names


def _assigned(
    assignment: nodes.Assign, reads: Callable[[nodes.Node | None], bool], *, namespaces: bool
) -> Iterator[str]:
    """The names under which `assignment` makes available what `reads` recognizes."""
    target, value = assignment.target, assignment.node
    if reads(value):
        if isinstance(target, nodes.Name):
            yield target.name
        elif not namespaces:
            raise _ConfusedError
        elif isinstance(target, nodes.NSRef):
            yield f"{target.name}.{target.attr}"
    elif namespaces:
        match target, value:
            case nodes.Name(name=name), nodes.Call(node=nodes.Name(name="namespace"), kwargs=kwargs):
                yield from (f"{name}.{given.key}" for given in kwargs if reads(given.value))


def _content_loops(template: nodes.Template, items: set[str], *, macros: bool) -> Iterator[nodes.For]:
    """The loops over a message's content, in the order of the template. `items` are the names of messages."""

    def is_content(node: nodes.Node) -> bool:
        return _content_owner(_source(node)) in items

    bound: dict[int, set[str]] = {}  # id of a loop inside a macro -> parameters of the macro that get a content
    for macro in template.find_all(nodes.Macro) if macros else ():
        parameters = set(_content_parameters(template, macro, is_content))
        for loop in macro.find_all(nodes.For):
            bound[id(loop)] = parameters or bound.get(id(loop), set())
    for loop in template.find_all(nodes.For):
        over = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        if is_content(loop.iter) or over in bound.get(id(loop), ("content",)):
            yield loop


def _content_parameters(
    template: nodes.Template, macro: nodes.Macro, is_content: Callable[[nodes.Node], bool]
) -> Iterator[str]:
    """The parameters of `macro` that are a message's content in some call."""
    names = [argument.name for argument in macro.args]
    for call in template.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            yield from (name for name, given in zip(names, call.args, strict=False) if is_content(given))
            yield from (given.key for given in call.kwargs if given.key in names and is_content(given.value))


def _target(loop: nodes.For) -> str:
    if isinstance(loop.target, nodes.Name):
        return loop.target.name
    raise _ConfusedError


def _source(node: nodes.Node | None) -> nodes.Node | None:
    """The expression that `node` reads, without filters, tests and slices."""
    while True:
        match node:
            case nodes.Filter(node=inner) | nodes.Test(node=inner) | nodes.Getitem(node=inner, arg=nodes.Slice()):
                node = inner
            case _:
                return node


def _name(node: nodes.Node | None) -> str | None:
    """The variable that `node` reads, or the attribute of a variable, as `namespace.attribute`."""
    match node:
        case nodes.Name(ctx="load", name=str(name)):
            return name
        case nodes.Getattr(node=owner, attr=attribute):
            before = _name(owner)
            return None if before is None else f"{before}.{attribute}"
        case _:
            return None


def _content_owner(node: nodes.Node | None) -> str | None:
    """The variable whose content `node` reads."""
    match node:
        case nodes.Getattr(node=nodes.Name() as owner, attr="content"):
            return _name(owner)
        case nodes.Getitem(node=nodes.Name() as owner, arg=nodes.Const(value="content")):
            return _name(owner)
        case _:
            return None
