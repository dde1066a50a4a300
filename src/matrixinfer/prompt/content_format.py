"""Detects which form of message content a chat template expects.

vLLM inspects the template to decide how it passes `content`: as a list of parts (`openai`) to a template that loops
over a message's content, as one string (`string`) to any other. Token ids are exact only if the gateway decides the
same way, so this follows vLLM's rule: names are tracked through plain assignments, filters, tests and slices, not
through macros.
"""

from __future__ import annotations

from jinja2 import nodes


def walks_content(template: nodes.Template) -> bool:
    """True when the template loops over the `content` of an item of `messages`."""
    lists = _aliases(template, "messages")
    loops = [(loop.target, _source(loop.iter)) for loop in template.find_all(nodes.For)]
    items = {target.name for target, source in loops if isinstance(target, nodes.Name) and _is_name(source, lists)}
    return any(_is_content(source, items) for _, source in loops)


def _aliases(template: nodes.Template, name: str) -> set[str]:
    """`name` and every variable assigned from it, directly or indirectly."""
    assigned = [(each.target, _source(each.node)) for each in template.find_all(nodes.Assign)]
    names: set[str] = set()
    more = {name}
    while more > names:
        names = more
        more = names | {
            target.name for target, source in assigned if isinstance(target, nodes.Name) and _is_name(source, names)
        }
    return names


def _source(node: nodes.Node | None) -> nodes.Node | None:
    """The expression that `node` reads, without filters, tests and slices."""
    while True:
        match node:
            case nodes.Filter(node=inner) | nodes.Test(node=inner) | nodes.Getitem(node=inner, arg=nodes.Slice()):
                node = inner
            case _:
                return node


def _is_name(node: nodes.Node | None, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name in names


def _is_content(node: nodes.Node | None, messages: set[str]) -> bool:
    match node:
        case nodes.Getattr(node=owner, attr="content") | nodes.Getitem(node=owner, arg=nodes.Const(value="content")):
            return _is_name(owner, messages)
        case _:
            return False
