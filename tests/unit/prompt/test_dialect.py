from __future__ import annotations

from types import SimpleNamespace

import pytest

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.chat_template import ChatTemplate
from matrixinfer.prompt.dialect import Dialect, dialect_of, dialects_of


@pytest.mark.parametrize(
    ("engine", "version", "dialect"),
    [
        ("vllm", "0.33.0", Dialect.VLLM),
        ("vllm", "v0.34.1rc2.dev3+gabc", Dialect.VLLM),
        ("vllm", "1.0", Dialect.VLLM),
        ("vllm", "0.32.0", Dialect.VLLM_31),
        ("vllm", "0.30.0+cpu", Dialect.VLLM_30),
        ("vllm", "0.29.0", Dialect.VLLM_24),
        ("vllm", "0.24.0", Dialect.VLLM_24),
        ("vllm", "0.23.9", Dialect.VLLM_OLD),
        ("vllm", "0.8.5.post1", Dialect.VLLM_OLD),
        ("vllm", "0.1.dev123+gabc", Dialect.VLLM_UNKNOWN),
        ("vllm", None, Dialect.VLLM_UNKNOWN),
        ("vllm", "nightly", Dialect.VLLM_UNKNOWN),
        ("other", None, Dialect.VLLM_UNKNOWN),
        (None, "0.33.0", Dialect.VLLM),
        ("sglang", "0.5.23", Dialect.SGLANG),
        ("sglang", "0.6.0", Dialect.SGLANG),
        ("sglang", "0.5.22.post1", Dialect.SGLANG_18),
        ("sglang", "0.5.18", Dialect.SGLANG_18),
        ("sglang", "0.5.17", Dialect.SGLANG_OLD),
        ("sglang", "0.4.9", Dialect.SGLANG_OLD),
        ("sglang", "0.0.0.dev0", Dialect.SGLANG_UNKNOWN),
        ("sglang", None, Dialect.SGLANG_UNKNOWN),
    ],
)
def test_the_dialect_follows_from_kind_and_version(engine: str | None, version: str | None, dialect: Dialect) -> None:
    assert dialect_of(engine, version) is dialect
    assert dialect.is_sglang == (engine == "sglang")


def test_a_fleet_has_each_dialect_once() -> None:
    fleet = [SimpleNamespace(engine="vllm", version=version) for version in ("0.33.0", "0.33.1", "0.31.0", "0.32.0")]
    assert dialects_of(fleet) == [Dialect.VLLM, Dialect.VLLM_31]


LOOP = "{% for m in messages %}"
INNER = "{% for p in m.content %}{% endfor %}"
MACRO = "{% macro show(given, more=1) %}{% for p in given %}{% endfor %}{% endmacro %}"
V28, V30, V33 = Dialect.VLLM_24, Dialect.VLLM_30, Dialect.VLLM
ALL = {V28, V30, V33}


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        (LOOP + INNER, ALL),
        (MACRO + LOOP + "{{ show(m.content) }}", {V30, V33}),
        (MACRO + LOOP + "{{ show(given=m['content'][1:] | list) }}", {V30, V33}),
        (MACRO + LOOP + "{{ show(1, m.content) }}{{ show(1, more=m.content) }}", set()),
        (MACRO + LOOP + "{{ show(m.other) }}", set()),
        # A loop over any variable called `content` counts, since 0.30 only outside of macros.
        (LOOP + "{% set content = m.x %}{% for p in content %}{% endfor %}", ALL),
        ("{% macro show(content) %}{% for p in content %}{% endfor %}{% endmacro %}" + LOOP + "{{ show(1) }}", {V28}),
        # Namespaces are followed since 0.33; before, assigning to one confused the inspection.
        ("{% set ns = namespace(rest=messages[1:]) %}{% for m in ns.rest %}" + INNER, {V33}),
        ("{% set ns = namespace() %}{% set ns.rest = messages %}" + LOOP + INNER, {V33}),
        ("{% set ns = namespace() %}{% set ns.rest = other %}" + LOOP + INNER, ALL),
        ("{% set a, b = messages %}" + LOOP + INNER, {V33}),
        ("{% for m, n in messages %}{% endfor %}" + LOOP + INNER, set()),
        (LOOP + "{% for p, q in m.content %}{% endfor %}", set()),
    ],
)
def test_each_version_of_vllm_inspects_templates_in_its_own_way(source: str, takes: set[Dialect]) -> None:
    ends = "{% endfor %}" * (source.count("{% for") - source.count("{% endfor"))
    template = ChatTemplate(source + ends)
    assert {each for each in ALL if template.takes_parts(each)} == takes
    assert template.takes_parts(Dialect.VLLM_31) == template.takes_parts(Dialect.VLLM_30)
    if takes in (set(), ALL):
        assert template.takes_parts(Dialect.VLLM_UNKNOWN) == bool(takes)
    else:
        with pytest.raises(TokenizeError, match="version, which is unknown"):
            template.takes_parts(Dialect.VLLM_UNKNOWN)


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        (LOOP + INNER, True),
        ("{% for message in messages %}{% for p in message['content'] | list %}", True),
        ("{% for turn in messages %}{% for p in turn.content %}", False),
        (LOOP + "{% for p in m.other %}", False),
        ("{# sees an image #}" + LOOP, True),
    ],
)
def test_sglang_looks_for_words_and_names(source: str, takes: bool) -> None:
    ends = "{% endfor %}" * (source.count("{% for") - source.count("{% endfor"))
    template = ChatTemplate(source + ends)
    assert {template.takes_parts(each) for each in Dialect if each.is_sglang} == {takes}
