"""Conversations for templates, and templates that use the features of the dialect."""

from __future__ import annotations

from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather of a "place" <b>now</b> – Zürich\'s, say',
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "a city", "enum": ["Zürich", "東京"]},
                    "days": {"type": "array", "items": {"type": "integer"}, "default": [1, 2]},
                    "exact": {"type": ["boolean", "null"]},
                },
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]
DOCUMENTS = [{"title": "One", "text": "First text."}, {"title": "Two", "contents": "Second\n\ntext."}]


def _said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def _calls(arguments: object, **more: object) -> dict[str, Any]:
    call = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]} | more


_ASKED = _said(("user", "How is the weather?"))
_RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": '{"degrees": 21.5}'}
_ARGUMENTS = {"place": "Zürich", "days": [1, 2], "exact": None, "nested": {"a": "<&>'\""}}
_TWO_CALLS = _calls(_ARGUMENTS)
_TWO_CALLS["tool_calls"] = [
    *_TWO_CALLS["tool_calls"],
    {"type": "function", "function": {"name": "stop", "arguments": {}}},
]

CHATS: dict[str, dict[str, Any]] = {
    "user": {"messages": _said(("user", "hi"))},
    "system": {"messages": _said(("system", "Be brief."), ("user", "hi"))},
    "turns": {
        "messages": _said(
            ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")
        )
    },
    "no generation prompt": {"messages": _said(("user", "a"), ("assistant", "b")), "add_generation_prompt": False},
    "tools": {"messages": _said(("system", "s"), ("user", "a")), "tools": TOOLS},
    "tools without system": {"messages": _ASKED, "tools": TOOLS},
    "no tools": {"messages": _ASKED, "tools": []},
    "call with object": {"messages": [*_ASKED, _calls(_ARGUMENTS), _RESULT], "tools": TOOLS},
    "call with string": {"messages": [*_ASKED, _calls('{"place": "Bern"}'), _RESULT], "tools": TOOLS},
    "two calls": {
        "messages": [*_ASKED, _TWO_CALLS, _RESULT, _RESULT, *_said(("assistant", "21.5"), ("user", "Thanks"))],
        "tools": TOOLS,
    },
    "call with text": {"messages": [*_ASKED, _calls(_ARGUMENTS, content="Let me see."), _RESULT], "tools": TOOLS},
    "result without call": {"messages": [*_ASKED, _RESULT]},
    "consecutive users": {"messages": _said(("user", "a"), ("user", "b"))},
    "assistant first": {"messages": _said(("assistant", "a"), ("user", "b"))},
    "late system": {"messages": _said(("user", "a"), ("assistant", "b"), ("system", "s"), ("user", "c"))},
    "developer": {"messages": _said(("developer", "d"), ("user", "a"))},
    "unknown role": {"messages": _said(("narrator", "once"), ("user", "a"))},
    "parts": {"messages": _said(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))},
    "image": {"messages": _said(("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}]))},
    "parts everywhere": {
        "messages": _said(
            *((role, [{"type": "text", "text": f"of {role}"}]) for role in ("system", "user", "assistant", "user"))
        )
    },
    "unicode and markup": {
        "messages": _said(("user", "  naïve\t<think>é</think> {{ x }} {% y %} <|im_end|> 👩‍👩‍👧‍👦\r\n\n 日本 \u2028"))
    },
    "empty": {"messages": _said(("system", ""), ("user", ""), ("assistant", ""), ("user", " "))},
    "null": {"messages": _said(("user", "a"), ("assistant", None), ("user", "b"))},
    "no content": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant"}, {"role": "user", "content": "b"}]
    },
    "thinking off": {"messages": _ASKED, "enable_thinking": False},
    "thinking on": {"messages": _ASKED, "enable_thinking": True, "reasoning_effort": "high"},
    "reasoning": {
        "messages": [*_ASKED, {"role": "assistant", "content": "b", "reasoning": "because"}, *_said(("user", "Why?"))]
    },
    "reasoning content": {
        "messages": [
            *_ASKED,
            {"role": "assistant", "content": "b", "reasoning_content": "\nbecause\n"},
            *_said(("user", "Why?")),
        ]
    },
    "think tags": {"messages": _said(("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c"))},
    "documents": {"messages": _ASKED, "documents": DOCUMENTS},
    "names": {
        "messages": [{"role": "user", "name": "Ann", "content": "a"}, {"role": "user", "name": "Bob", "content": "b"}]
    },
    "continued": {
        "messages": _said(("user", "a"), ("assistant", "once upon ")),
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "continued parts": {
        "messages": _said(("user", "a"), ("assistant", [{"type": "text", "text": "once upon "}])),
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "continued null": {
        "messages": _said(("user", "a"), ("assistant", None)),
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "date": {"messages": _ASKED, "date_string": "03 Feb 2031", "xml_tools": False},
    "special token": {"messages": _ASKED, "bos_token": "<other>", "custom": [1, {"a": None}]},
}
"""Arguments of `apply_chat_template`, by name of the case. Unknown arguments become variables of the template."""

_LOOP = "{% for m in messages %}"
DIALECT: dict[str, str] = {
    "tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ messages[-1].content }}",
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ custom | tojson }}",
    "tojson order": "{{ messages | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
    "tojson words": "{{ messages | tojson(True, 1) }}{{ tojson is defined }}",
    "date": "{{ strftime_now('%A %d %B %Y %H:%M') }}{{ date_string }}",
    "refusal": _LOOP
    + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}",
    "break": _LOOP
    + "{% if loop.index0 == 2 %}{% break %}{% endif %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "loop": _LOOP
    + "{{ loop.index }}{{ loop.revindex0 }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.cycle('a', 'b') }}"
    "{{ loop.previtem.role }}{{ loop.nextitem.role }}{{ loop.changed(m.role) }}{% else %}none{% endfor %}",
    "recursive": "{% for m in messages recursive %}{{ m.role }}{% if loop.depth < 2 %}{{ loop(messages[:1]) }}{% endif %}{% endfor %}",
    "generation": _LOOP + "{% generation %}\n[{{ m.content }}]{{ loop.index }}{% endgeneration %};{% endfor %}",
    "generation scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation break": _LOOP + "{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "generation open": "{% generation %}never closed",
    "namespace": "{% set ns = namespace(n=0, last='') %}"
    + _LOOP
    + "{% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}{% endfor %}"
    "{{ ns.n }}{{ ns.last }}{{ ns.absent }}{{ ns.absent is defined }}",
    "namespace of pairs": "{{ namespace([('a', 1)]).a }}{{ namespace({'self': 2}).self }}{{ namespace(self=3).self }}",
    "namespace with underscore": "{{ namespace(_x=1) }}",
    "namespace set underscore": "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "namespace item": "{% set ns = namespace(a=1) %}{{ ns['a'] }}{{ ns.__class__ }}",
    "dict": "{{ dict(a=1, **{'b': 2}) }}{{ dict([('x', 1)]).x }}{{ dict.fromkeys(['k'], 0) }}",
    "dict class": "{{ dict.__class__ }}{{ dict.mro }}{{ dict().__class__.__mro__ }}",
    "dict methods": _LOOP
    + "{% for k, v in m.items() %}{{ k }}{% endfor %}{{ m.keys() | list }}{{ m.get('x', 'y') }}{{ m.values() | list | length }}{% endfor %}",
    "dict key like a method": "{% set d = {'items': 1, 'get': 2, 'other': 3} %}{{ d.items is callable }}{{ d['items'] }}{{ d.other }}{{ d.get('get') }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of dict": "{% set d = {'a': 1} %}{{ d.update({'b': 2}) }}{{ d }}",
    "mutation by pop": "{{ messages.pop() }}",
    "dunder": "{{ messages.__class__ }}|{{ messages[0].__class__ }}|{{ ''.__class__.__mro__ }}",
    "dunder called": "{{ messages.__len__() }}",
    "dunder through attr": "{{ '' | attr('__class__') }}{{ messages[0] | attr('role') }}",
    "dunder item": "{{ messages[0]['__class__'] }}{{ 'abc'['upper']() }}",
    "format": "{{ '{0.__class__}'.format(1) }}",
    "format plain": "{{ '{0}-{a}'.format(1, a=2) }}{{ '%s' | format('x') }}{{ '{x}'.format_map({'x': 1}) }}{{ '%s-%d' % ('a', 1) }}",
    "text methods": _LOOP
    + "{% if m.content is string %}{{ m.content.strip().split('\\n')[0].upper() }}{{ m.content.startswith('a') }}"
    "{{ m.content.replace('a', 'b', 1) }}{{ m.content.rstrip('\\n').lstrip().title() }}{% endif %}{% endfor %}",
    "text attribute": "{{ 'abc'.nothing }}{{ 'abc'.nothing is defined }}{{ 'abc'.encode('utf-8') }}",
    "undefined called": "{{ nothing() }}",
    "undefined below undefined": "{{ nothing.more }}",
    "undefined below dict": "{{ messages[0].nothing }}{{ messages[0].nothing is defined }}{{ messages[0]['nothing'] }}",
    "undefined below that": "{{ messages[0].nothing.more }}",
    "undefined index": "{{ messages[99] }}{{ messages[99].role }}",
    "undefined in text": "{{ 'a' + nothing }}",
    "add none": "{{ 'a' + messages[-1].content }}",
    "slices": "{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ 'abc'[1:] }}{{ (messages[-1].content or '')[:2] }}",
    "whitespace": "  {% if true %}\n    a  \n  {%- endif -%}\n  b {{- ' c ' -}} d\n{#- comment -#}\n\n  {%+ if true %}e{% endif +%}\n",
    "tests": "{{ 1 is number }}{{ 'a' is string }}{{ messages is iterable }}{{ messages[0] is mapping }}{{ none is none }}"
    "{{ messages is sequence }}{{ tools is none }}{{ documents is not none }}{{ 1 is odd }}{{ 'a' in 'abc' }}{{ true is boolean }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | first | default('none', true) }}"
    "{{ [3, 1] | sort | join }}{{ 'a<b' | e }}{{ 'x' | upper }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2] | sum }}{{ 'a b' | wordcount }}",
    "groupby": "{% for role, some in messages | groupby('role') %}{{ role }}{{ some | length }}{% endfor %}",
    "safe": "{{ '<b>' | safe }}{{ '<b>' | escape }}{{ '<b>' | forceescape }}",
    "macro": "{% macro show(m, mark='#') %}{{ mark }}{{ m.role }}{{ varargs }}{{ kwargs }}{{ caller() if caller else '' }}{% endmacro %}"
    "{{ show(messages[0]) }}{{ show(messages[0], '*', 1, x=2) }}{% call show(messages[0]) %}inside{% endcall %}",
    "set block": "{% set text %}  {{ messages[0].role }}\n{% endset %}[{{ text }}]{{ text | trim }}",
    "filter block": "{% filter upper %}{{ messages[0].role }}{% endfilter %}",
    "with": "{% with x = 1, y = 2 %}{{ x + y }}{% endwith %}{{ x is defined }}",
    "joiner": "{% set comma = joiner(', ') %}"
    + _LOOP
    + "{{ comma() }}{{ m.role }}{% endfor %}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}",
    "range": "{{ range(3) | list }}{{ range(3, 0, -1) | list }}{{ lipsum is defined }}",
    "range too long": "{{ range(1000000) | list }}",
    "numbers": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 1.0 }}{{ -3 | abs }}{{ 1e3 | int }}{{ '0x1f' | int(base=16) }}{{ 3.14159 | round(2) }}",
    "division by zero": "{{ 1 / 0 }}",
    "concatenation": "{{ 1 ~ 'a' ~ none ~ true ~ [1] }}",
    "ternary": "{{ 'a' if enable_thinking is defined and enable_thinking is false else 'b' }}{{ 'x' if false }}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "import": "{% import 'x' as y %}",
    "block": "{% block a %}{{ messages[0].role }}{% endblock %}{{ self.a() }}",
    "self": "{{ self }}",
    "do": "{% do messages.append(1) %}",
    "syntax": "{% if %}",
    "unknown filter": "{{ 1 | nothing }}",
    "unknown test": "{{ 1 is nothing }}",
    "reasoning": _LOOP + "{{ m.thinking }}|{{ m.reasoning }}|{{ m.reasoning_content }}|{{ m | tojson }}{% endfor %}",
    "content twice": _LOOP
    + "{{ m.role }}:{% if m.content is string %}{{ m.content }}{{ m.content | trim }}{% elif m.content %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}{% endif %};{% endfor %}",
    "trimmed": _LOOP + "{{ m.content | trim }}\n{% endfor %}",
    "drops the last": "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
    "constant": "always the same content",
    "documents": "{% for d in documents or [] %}{{ d.title }}:{{ d['text'] }}{{ d.contents }}\n{% endfor %}{{ messages[0].content }}",
    "tool calls": _LOOP
    + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c['function']['arguments'] | tojson }}"
    "{{ c.function.arguments.items() | list if c.function.arguments is mapping }}{% endfor %}{{ m.content }}{% endfor %}",
}
"""Templates by the feature that they use."""
