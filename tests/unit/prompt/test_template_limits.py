"""A template is a foreign program: whatever it does, it ends soon and takes little memory."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.chat_template import CHATML, ChatTemplate
from matrixinfer.prompt.effort import Abandoned, Effort

MESSAGES = [{"role": "user", "content": "hello"}]
GROWS_FASTER_THAN_TIME = 256 * 1024 * 1024
SECONDS = 0.3

LARGE = {
    "product": "{{ 'a' * 10**10 }}",
    "product of a list": "{{ ([1] * 3000000000) | length }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "products of numbers": "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(34) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled text": "{% set n = namespace(x='ab') %}{% for i in range(34) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by a macro": "{% macro m(x, i) %}{% if i %}{{ m(x ~ x, i - 1) }}{% endif %}{% endmacro %}{{ m('a', 40) }}",
    "doubled output": "{% macro m(i) %}{% if i %}{{ m(i - 1) }}{{ m(i - 1) }}{% else %}aaaa{% endif %}{% endmacro %}{{ m(30) }}",
    "filled block": "{% set x %}{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}{{ x | length }}",
    "kept texts": "{% set n = namespace(x=[]) %}{% for i in range(100000) %}{% set n.x = n.x + ['a' * 1000000] %}{% endfor %}",
    "kept copies": "{% set x %}{% for i in range(100000) %}{{ ('a' * 1000000).upper() }}{% endfor %}{% endset %}",
    "kept by a macro": "{% macro m() %}{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}{% endmacro %}{{ m() | length }}",
    "mapped list": "{{ range(100000) | map('string') | map('center', 100000) | list | length }}",
    "center": "{{ 'a' | center(3000000000) | length }}",
    "ljust": "{{ 'a'.ljust(3000000000) | length }}",
    "zfill": "{{ 'a'.zfill(width) }}",
    "escaped": "{{ ('a' | escape).center(3000000000) }}",
    "bytes": "{{ (1).to_bytes(3000000000, 'big') }}",
    "width": "{{ '%2000000000d' | format(1) | length }}",
    "width of an operator": "{{ '%2000000000d' % 1 }}",
    "width of an argument": "{{ '%*d' % (2000000000, 1) }}",
    "width of a method": "{{ '{:>2000000000}'.format(1) | length }}",
    "nested width": "{{ '{:>{}}'.format('a', 2000000000) }}",
    "many values": "{{ ('%s' * 100000) % (('a' * 1000000,) * 100000) }}",
    "replace": "{{ ('a' * 8000000).replace('a', 'b' * 1000) | length }}",
    "replace filter": "{{ ('a' * 8000000) | replace('a', 'b' * 1000) | length }}",
    "join": "{{ ([('a' * 8000000)] * 100000).__len__() }}{{ ([('a' * 8000000)] * 100000) | join }}",
    "join method": "{{ ''.join([('a' * 8000000)] * 100000) }}",
    "join of an attribute": "{{ ([{'x': 'a' * 8000000}] * 1000) | join(attribute='x') }}",
    "mapped join": "{{ range(100000) | map('string') | map('center', 100000) | join }}",
    "expandtabs": "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "indent": "{{ ('a\\n' * 100000) | indent(1000000) }}",
    "json indent": "{{ [[[1]]] | tojson(indent=1000000000) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "slices": "{{ [1] | slice(1000000000) | list }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "lipsum": "{{ lipsum(1000000000) }}",
    "nested lists": "{% set n = namespace(x=['a']) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested dicts": "{% set n = namespace(x={}) %}{% for i in range(40) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x | tojson }}",
    "nested dict calls": "{% set n = namespace(x={}) %}{% for i in range(40) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "nested keys": "{% set n = namespace(x=1) %}{% for i in range(40) %}{% set n.x = dict.fromkeys(range(9), n.x) %}{% endfor %}{{ n.x }}",
}

ENDLESS = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "large range": "{% for a in range(10**9) %}a{% endfor %}",
    "conditions": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(i) %}{% if i %}{{ m(i - 1) }}{{ m(i - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in [[1]] recursive %}{% for b in range(100000) %}{{ loop(b) if b is iterable }}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE)
def test_no_template_takes_much_memory(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TokenizeError), Effort(SECONDS * 10):
        ChatTemplate(source).render(MESSAGES, width=3_000_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWS_FASTER_THAN_TIME // 1024


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_every_template_ends(source: str) -> None:
    template, started = ChatTemplate(source), time.monotonic()
    with pytest.raises(TokenizeError), Effort(SECONDS):
        template.render(MESSAGES)
    assert time.monotonic() - started < SECONDS + 20


def test_a_template_that_nobody_waits_for_ends() -> None:
    template, effort, began = ChatTemplate(ENDLESS["loops"]), Effort(60.0), threading.Event()
    ended: list[BaseException] = []

    def render() -> None:
        with effort:
            began.set()
            try:
                template.render(MESSAGES)
            except Abandoned as error:
                ended.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    assert began.wait(10)
    effort.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert "nobody waits" in str(ended[0])


def test_what_honest_templates_do_is_not_changed() -> None:
    source = (
        "{%- set ns = namespace(text='', parts=[]) -%}"
        "{%- for m in messages -%}{%- set ns.text = ns.text + m.content ~ '|' -%}"
        "{%- set ns.parts = ns.parts + [m.content] -%}{%- if loop.last -%}{{ loop.index }}{{ loop.length }}{%- endif -%}"
        "{%- endfor -%}{{ ns.text }}{{ ns.parts | join(', ') }}{{ '%s=%d' | format('a', 3) }}{{ '%05.1f' % 2.5 }}"
        "{{ {'a': ns.parts} | tojson(indent=2) }}{{ 'x'.ljust(3) }}{{ 'a b' | replace(' ', '') }}{{ 'q' * 3 }}{{ 7 % 4 }}"
        "{{ '{:>4}|{}'.format('a', 2) }}{{ 2 ** 10 }}{{ [1, 2] * 2 }}{{ 'a\\nb' | indent(2) }}{{ ' '.join(['x', 'y']) }}"
        "{{ messages | map(attribute='role') | join('-') }}{{ messages | join('+', attribute='role') }}"
    )
    assert ChatTemplate(source).render([*MESSAGES, {"role": "assistant", "content": "yes"}]) == (
        '22hello|yes|hello, yesa=3002.5{\n  "a": [\n    "hello",\n    "yes"\n  ]\n}x  abqqq3   a|21024[1, 2, 1, 2]'
        "a\n  bx yuser-assistantuser+assistant"
    )


def test_the_built_in_template_takes_the_largest_prompt() -> None:
    content = "x" * (4 * 1024 * 1024)
    assert ChatTemplate(CHATML).render([{"role": "user", "content": content}]).count("x") == len(content)
