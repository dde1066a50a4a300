"""Bounds what a chat template may take: a template is a program that comes with a model's files. Pure.

No single step makes a text, a list or what they contain longer than `MAX_LENGTH`, and all steps together no more than
`MAX_TOTAL`. Steps that could make much of little are measured before they are taken; those that can only put together what
exists, right after. Loops and macros are made to ask whether they may go on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any, cast

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import do_join, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.utils import pass_eval_context

from matrixinfer.prompt import effort

MAX_LENGTH = 8 * 1024 * 1024
"""Characters of a text, or items of a list. The longest prompt that is tokenized has half as many."""
MAX_TOTAL = 32 * MAX_LENGTH
"""The same for all that one rendering makes, whether it keeps it or not."""
_NOTED_LENGTH = 256
"""Shorter texts are not counted: in the time that a template may take, it cannot make enough of them."""
_MAX_NUMBER_BITS = 1024
_MAX_SMALL = 100_000
"""Characters or items that a costly filter takes, and the largest number that is passed to it."""
_MAX_PADDING = 100
_ITEM_WEIGHT = 8
_LONG_WIDTH = re.compile(r"\d{5}|\*")
"""A width in a format that makes texts long, or is taken from an argument."""
_SIZED = (str, bytes, list, tuple)
_MEASURED, _WEIGHED = " measured", " weighed"
"""Names of filters that no template can write."""
_CONTAINERS = (dict, list, tuple)

_TOO_LONG = "the template makes a text or a list that is too long"

Filter = Callable[..., Any]


class TooLong(SecurityError):
    """The template makes a text, a list or a number that is too large."""


def instrument(tree: nodes.Template, environment: Environment) -> None:
    """Make loops and macros read `environment.tick`, and pass what the template puts together through filters.

    The filters are `measured`, for sums, joined texts and what is written, and `weighed`, for containers.
    """
    found = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
    for each in cast("Iterator[nodes.For | nodes.Macro | nodes.CallBlock]", found):
        if isinstance(each, nodes.Macro) and not any(map(_calls_name, each.find_all(nodes.Call))):
            continue  # it calls no macro, so it takes no longer than its loops
        tick = nodes.EnvironmentAttribute("tick", lineno=each.lineno)
        each.body.insert(0, nodes.ExprStmt(tick, lineno=each.lineno))
    _wrap_children(tree)
    tree.set_environment(environment)


def _wrap_children(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, _wrapped(value))
        elif isinstance(value, list):
            value[:] = [_wrapped(each) if isinstance(each, nodes.Node) else each for each in value]


def _wrapped(node: nodes.Node) -> nodes.Node:
    _wrap_children(node)
    if isinstance(node, nodes.Output):
        node.nodes[:] = [_filtered(each) if _makes_text(each) else each for each in node.nodes]
    name = None
    if isinstance(node, nodes.Add | nodes.Concat):
        name = _MEASURED
    elif isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        name = None if _is_constant(node) else _WEIGHED
    return node if name is None else _filtered(node, name)


def _calls_name(call: nodes.Call) -> bool:
    return isinstance(call.node, nodes.Name)


def _makes_text(node: nodes.Expr) -> bool:
    """Whether an expression may be a text that exists nowhere else, and has not been measured."""
    if isinstance(node, nodes.Filter):
        return node.name not in (_MEASURED, _WEIGHED, "join")
    if isinstance(node, nodes.Call):
        return not _calls_name(node)  # what a macro writes is measured
    return not isinstance(node, nodes.TemplateData | nodes.Name | nodes.Getattr | nodes.Const)


def _filtered(node: nodes.Node, name: str = _MEASURED) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _is_constant(node: nodes.Node) -> bool:
    return next(node.find_all((nodes.Name, nodes.Call, nodes.Filter)), None) is None


def measured(value: Any) -> Any:
    """`value`, unless it is too long."""
    if isinstance(value, _SIZED) and (length := len(value)) > _NOTED_LENGTH:
        _check(length)
    return value


def weighed(value: Any) -> Any:
    """`value`, unless it contains too much: what it contains several times counts several times."""
    weight, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            weight += len(each)
        elif isinstance(each, _CONTAINERS):
            waiting += each.values() if isinstance(each, dict) else each
            weight += len(each) * _ITEM_WEIGHT
        if weight > MAX_LENGTH:
            raise TooLong(_TOO_LONG)
    _check(weight)
    return value


def joined(texts: Iterable[str]) -> str:
    """What a template has written, unless it is too long."""
    written = list(texts)
    _check(sum(map(len, written)))
    return "".join(written)


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Raise `TooLong` before an operation whose result may be much larger than what it is made of."""
    if operator == "%":
        if isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_NUMBER_BITS:
            raise TooLong("the template computes a number that is too large")
    elif operator == "*":
        for sized, count in ((left, right), (right, left)):
            if isinstance(sized, _SIZED) and isinstance(count, int):
                _check(len(sized) * count)


def check_call(function: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call. Raises `TooLong` if its result may be much larger than what it is made of."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, str | bytes | int):
        for each in (*args, *named.values()):
            if isinstance(each, int):
                _check(abs(each))
        bounded = _METHODS.get(function.__name__)
        if bounded is None:
            return args
        return bounded(owner, *args, **{key: each for key, each in named.items() if not key.startswith("_")})
    text = getattr(getattr(function, "__wrapped__", None), "__self__", None)
    if isinstance(text, str):  # the sandbox wraps the methods `format` and `format_map`
        values = list(named.values())
        for each in args:
            values += each.values() if isinstance(each, Mapping) else [each]
        _check_format(text, values)
    return args


def _join(owner: str, texts: Iterable[Any]) -> tuple[Any, ...]:
    return (_listed(texts, len(owner)),)


def _replace(owner: str, old: str, new: str, *count: Any) -> tuple[Any, ...]:
    _check(len(owner) + owner.count(old) * len(new))
    return (old, new, *count)


def _expandtabs(owner: str, tabsize: int = 8) -> tuple[Any, ...]:
    _check(len(owner) * max(1, tabsize))
    return (tabsize,)


def _translate(*_: Any) -> tuple[Any, ...]:
    raise TooLong("the template calls `translate`, which is not supported")


_METHODS: Mapping[str, Callable[..., tuple[Any, ...]]] = MappingProxyType(
    {"join": _join, "replace": _replace, "expandtabs": _expandtabs, "translate": _translate}
)


def bounded_filters(filters: Mapping[str, Filter]) -> dict[str, Filter]:
    """Jinja's filters, with bounds on those that can make much of little."""
    checks: dict[str, Callable[..., object]] = {
        **dict.fromkeys(("batch", "pprint", "slice", "urlize", "wordwrap", "xmlattr"), _check_small),
        **dict.fromkeys(("center", "indent", "round", "truncate"), _check_padding),
        "replace": _replace,
        "format": lambda text, *args, **named: _check_format(str(text), (*args, *named.values())),
    }
    changed = {name: _checked(filters[name], check) for name, check in checks.items()}
    return {**filters, **changed, "join": _join_filter, "list": _list_filter, _MEASURED: measured, _WEIGHED: weighed}


def _checked(function: Filter, check: Callable[..., object]) -> Filter:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        check(*args[first:], **named)
        return measured(function(*args, **named))

    return checked


@pass_eval_context
def _join_filter(context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = value if attribute is None else map(make_attrgetter(context.environment, attribute), value)
    return str(do_join(context, _listed((each if isinstance(each, str) else str(each) for each in items), len(d)), d))


def _list_filter(value: Iterable[Any]) -> list[Any]:
    return _listed(value)


def _listed(values: Iterable[Any], between: int = 0) -> list[Any]:
    """The values, unless they are too long together, with so much between any two of them."""
    listed, length = [], 0
    for each in values:
        length += between + (len(each) if isinstance(each, _SIZED) else 1)
        if length > MAX_LENGTH:
            raise TooLong(_TOO_LONG)
        listed.append(each)
    _check(length)
    return listed


def _check(length: int) -> None:
    if length > _NOTED_LENGTH and (length > MAX_LENGTH or effort.spend(length) > MAX_TOTAL):
        raise TooLong(_TOO_LONG)


def _check_small(value: Any, *args: Any, **named: Any) -> None:
    for each in (value, *args, *named.values()):
        size = each if isinstance(each, int) else len(each) if isinstance(each, (*_SIZED, dict)) else 0
        if size > _MAX_SMALL:
            raise TooLong("the template passes too much to a filter")


def _check_padding(value: Any, *args: Any, **named: Any) -> None:
    """The arguments say how much is added, to each line of a text at most."""
    lines = value.count("\n") + 1 if isinstance(value, str) else 1
    for each in (*args, *named.values()):
        size = each if isinstance(each, int) else len(each) if isinstance(each, str) else 0
        if size > _MAX_PADDING:
            _check(size * lines if isinstance(value, str) else MAX_LENGTH + 1)


def _check_format(text: str, values: Iterable[Any]) -> None:
    """A format has no widths that make texts long, and repeats no long values."""
    if _LONG_WIDTH.search(text):
        raise TooLong("the template formats with a width that is too large or not fixed")
    longest = 0
    for each in values:
        if isinstance(each, int):
            longest = max(longest, each.bit_length(), abs(each) if abs(each) > _MAX_SMALL and "{" in text else 0)
        elif isinstance(each, _SIZED):
            longest = max(longest, len(each))
    _check(len(text) + (text.count("%") + text.count("{")) * longest)
