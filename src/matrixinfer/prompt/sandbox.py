"""The Jinja dialect of chat templates: a sandbox with the extensions of Hugging Face transformers 5.

Jinja's sandbox checks every attribute access in several Python calls. Most accesses are keys of messages, methods of
strings and loop variables, for which the result is known in advance; those take a short cut here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from matrixinfer.prompt import resumable, resuming, template_limits
from matrixinfer.prompt.effort import check

_TICKS = 16
"""In so many steps of loops it is asked once whether they may go on."""
_MAX_FORM = 256
_MAX_INDENT = 16
_ATTRIBUTES_OF_DICTS = frozenset(dir(dict))
_METHODS_OF_TEXTS = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"}
"""The sandbox returns these methods unchanged; it wraps the formatting methods."""
_STATE_OF_LOOPS = frozenset({"depth", "depth0", "first", "index", "index0", "last", "length", "revindex", "revindex0"})


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles chat templates. `now` is the clock of `strftime_now`."""

    concat = staticmethod(template_limits.joined)
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, *, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters = {**template_limits.bounded_filters(self.filters), **resuming.FILTERS, "tojson": _tojson}
        self._ticks = 0
        self.globals |= {
            "dict": _Dicts(),
            "lipsum": _lipsum,
            "namespace": _Variables,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: now().strftime(form[:_MAX_FORM]),
        }

    def compiled(self, tree: nodes.Template, *, continues: bool = False) -> jinja2.Template:
        """Compile a template so that it stays within bounds when it is rendered. Changes `tree`.

        With `continues`, it is always given a `Rendering`, and can be continued.
        """
        template_limits.instrument(tree, self)
        if continues:
            resumable.instrument(tree, self)
        template = self.from_string(tree)
        template.globals = dict(template.globals)  # each rendering copies them, which takes long for a `ChainMap`
        return template

    @property
    def tick(self) -> None:
        """Templates read this in every loop. Raises `Abandoned` when rendering must end."""
        self._ticks += 1
        if not self._ticks % _TICKS:
            check()

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, if the result is not too large."""
        template_limits.check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - names no keyword takes
        """Call what a template calls, if the result is not too large."""
        if type(__obj) is Macro:  # always safe; what it writes is measured
            return __context.call(__obj, *args, **kwargs)
        args = template_limits.check_call(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return template_limits.weighed(result) if type(__obj) is _Dicts else result

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return what the base class returns, but faster."""
        kind = type(obj)
        if kind is dict:
            if attribute not in _ATTRIBUTES_OF_DICTS:
                try:
                    return obj[attribute]
                except KeyError:
                    return self.undefined(obj=obj, name=attribute)
        elif kind is str:
            if attribute in _METHODS_OF_TEXTS:
                return getattr(obj, attribute)
        elif kind is LoopContext:
            if attribute in _STATE_OF_LOOPS:
                return getattr(obj, attribute)
        elif kind is _Variables and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


class _Variables(Namespace):
    """Jinja's `namespace` that refuses names with a leading underscore, which could reach Python internals."""

    def __init__(*args: Any, **fields: Any) -> None:
        self, *rest = args
        fields = dict(*rest, **fields)
        for name in fields:
            _check_name(name)
        Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may hold others, again and again


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


class _Dicts:
    """The parts of `dict` that a template may use."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        made: dict[Any, Any] = dict.fromkeys(*args)
        return template_limits.weighed(made)  # type: ignore[no-any-return]


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks assistant text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block has its own scope, so `break` and `continue` inside it cannot leave it.
        return nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

    def _rendered(self, caller: Callable[[], str]) -> str:
        return caller()


def _lipsum(*_: Any, **__: Any) -> NoReturn:
    raise SecurityError("the template asks for a random text")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. Jinja's own filter escapes HTML, which models have not seen in training."""
    if (indent if isinstance(indent, int) else len(indent or "")) > _MAX_INDENT:
        raise template_limits.TooLong("the template indents JSON too far")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
