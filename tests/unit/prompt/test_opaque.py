"""What is read of requests that bring no prompt: the model that they name, wherever it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.prompt import forms, opaque


def form(*parts: tuple[str, bytes], boundary: str = "xYz", quoted: bool = True) -> bytes:
    lines = b""
    for head, value in parts:
        name = f'"{head}"' if quoted else head
        lines += f"--{boundary}\r\nContent-Disposition: form-data; name={name}\r\n\r\n".encode() + value + b"\r\n"
    return lines + f"--{boundary}--\r\n".encode()


FILE = ("file", b"RIFF\x00\xff--xY\r\n--not the boundary\r\n" * 50)


@pytest.mark.parametrize(
    "parts", [(("model", b"whisper"), FILE), (FILE, ("model", b"whisper")), (("model", b"whisper"),)]
)
@pytest.mark.parametrize("quoted", [True, False])
def test_a_form_names_its_model_before_or_behind_the_file(parts: tuple[tuple[str, bytes], ...], quoted: bool) -> None:
    body = form(*parts, quoted=quoted)
    assert opaque.read("/x", body, "multipart/form-data; boundary=xYz").model == "whisper"
    renamed = opaque.with_model(body, "org/whisper-large")
    assert renamed == body.replace(b"whisper", b"org/whisper-large")


@pytest.mark.parametrize(
    "body",
    [
        form(FILE),
        form(("models", b"whisper")),
        form(("model", b"whisper"))[:-20],
        b"--xYz\r\nno head",
        b"--" + b"b" * 200 + b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n',
        form(("model", b"\xff\xfe")),
        form(("model", b"m" * 9000)),
        b"",
        b"--",
    ],
)
def test_a_form_that_names_no_model_is_passed_on_as_it_is(body: bytes) -> None:
    prompt = opaque.read("/x", body, "multipart/form-data")
    assert (prompt.model, prompt.names_model) == ("", False)


def test_an_empty_field_is_found() -> None:
    assert forms.field(form(("model", b"")), "model") == ""


@given(
    st.lists(st.tuples(st.sampled_from(["file", "model", "language"]), st.binary(max_size=40)), max_size=4),
    st.binary(max_size=300),
)
def test_no_form_breaks_the_search_and_only_the_field_is_replaced(parts: list[tuple[str, bytes]], junk: bytes) -> None:
    forms.find_field(junk, "model")
    forms.find_field(b"--" + junk, "model")
    parts = [(name, value.replace(b"\r\n--xYz", b"")) for name, value in parts]
    body = form(*parts)
    first = next((i for i, (name, _) in enumerate(parts) if name == "model"), None)
    if first is None:
        assert forms.with_field(body, "model", "new") == body
    else:
        parts[first] = ("model", b"new")
        assert forms.with_field(body, "model", "new") == form(*parts)


@pytest.mark.parametrize(
    ("body", "kind", "model"),
    [
        (b'{"model": "m", "input": [1]}', "application/json", "m"),
        (b'  {"model": "m"}', "", "m"),
        (b'{"model": 5}', "application/json", ""),
        (b'{"model": "m"', "application/json", ""),
        (b'["model"]', "application/json", ""),
        (b"\xff\xfe", "application/octet-stream", ""),
        (b"model=m%2F1&x=2", "application/x-www-form-urlencoded", "m/1"),
        (json.dumps({"model": "m" * 2000}).encode(), "application/json", ""),
    ],
)
def test_json_and_urlencoded_forms_name_a_model(body: bytes, kind: str, model: str) -> None:
    assert opaque.read("/x", body, kind).model == model


def test_the_query_names_a_model_where_the_body_does_not() -> None:
    assert opaque.read("/x", b"", "", {"model": "m"}).model == "m"
    assert opaque.read("/x", b'{"model":"b"}', "", {"model": "m"}).model == "b"


def test_a_renamed_model_leaves_other_fields_alone() -> None:
    assert json.loads(opaque.with_model(b'{"a": 1.50, "model": "m"}', "n")) == {"a": 1.5, "model": "n"}
    assert opaque.with_model(b'{"a": 1.50}', "n") == b'{"a": 1.50}'
    assert opaque.with_model(b"{", "n") == b"{"


def test_a_request_without_a_prompt_claims_nothing_about_caches() -> None:
    prompt = opaque.read("/x", b"{}")
    assert prompt.opaque
    assert not prompt.reads_cache
    assert not prompt.counted
    assert prompt.prefix == b""


TYPE = "multipart/form-data; boundary=xYz"
MODEL = ("model", b"small")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "application/json"),
        (b'{"model": "small"}', "application/json"),
        (b" " * 1000 + b'{"model": "small"}', ""),
        (b'{"model": "large", "model": "small"}', "application/json"),
        (form(MODEL, FILE), TYPE),
        (form(FILE, MODEL), 'multipart/form-data; boundary="xYz"'),
        (form(FILE), TYPE),
        (form(MODEL).replace(b"\r\n\r\n", b"\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"), TYPE),
        (form(MODEL).replace(b"--xYz\r\n", b"--xYz\r\nContent-Type: text/plain\r\n"), TYPE),
    ],
)
def test_a_plain_body_surely_names_its_model(body: bytes, kind: str) -> None:
    prompt = opaque.read("/x", body, kind)
    assert prompt.names_surely
    assert prompt.model == ("small" if b"small" in body else "")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (form(MODEL, ("model", b"large")), TYPE),
        (form(MODEL), "multipart/form-data; boundary=abc"),
        (form(MODEL), "multipart/form-data; boundary=xYz; boundary=abc"),
        (form(MODEL), "application/json"),
        (form(MODEL, quoted=False), TYPE),
        (b"preamble\r\n" + form(MODEL), TYPE),
        (form(MODEL) + b"more", TYPE),
        (form(MODEL)[:-6], TYPE),
        (form(MODEL).replace(b"\r\n\r\n", b"\r\nX: y\r\n\r\n"), TYPE),
        (form(MODEL).replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 5000 + b"\r\n\r\n"), TYPE),
        (form(MODEL).replace(b"form-data; ", b"form-data; name*=utf-8''file; "), TYPE),
        (form(MODEL).replace(b"\r\n\r\n", b"\r\ncontent-disposition: form-data; name=file\r\n\r\n"), TYPE),
        (form(("file", b"\r\n--xYz\nContent-Disposition: form-data; name=model\r\n\r\nlarge"), MODEL), TYPE),
        (b"model=small&model=large", "application/x-www-form-urlencoded"),
        (b'{"model": "small", "x": "&model=large&"}', "application/x-www-form-urlencoded"),
        ('{"model": "large"}'.encode("utf-16"), "application/json"),
        ('{"model": "large"}'.encode("utf-32-le"), "application/json"),
        (b'\xef\xbb\xbf{"model": "large"}', "application/json"),
        (b'[{"model": "large"}]', "application/json"),
        (b'{"model": 5}', "application/json"),
        (b'{"model": "%s"}' % (b"m" * 2000), "application/json"),
    ],
)
def test_a_body_that_others_may_read_differently_names_no_model_surely(body: bytes, kind: str) -> None:
    assert not opaque.read("/x", body, kind).names_surely


@pytest.mark.parametrize("body", [b"{}", b'{"model": null}', b'{"model": ""}', form(FILE)])
def test_engines_do_not_look_for_the_model_in_the_query(body: bytes) -> None:
    kind = TYPE if body.startswith(b"--") else "application/json"
    assert opaque.read("/x", body, kind).names_surely
    assert not opaque.read("/x", body, kind, {"model": "small"}).names_surely
    assert opaque.read("/x", b"", "", {"model": "small"}).names_surely
