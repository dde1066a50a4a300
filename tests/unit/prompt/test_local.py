from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tokenizers import normalizers

from matrixinfer.blocks import TokenBlockProcessor, TokenIds
from matrixinfer.errors import ConfigError, TokenizeError
from matrixinfer.prompt import encoders
from matrixinfer.prompt import local as local_module
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.requests import parse
from matrixinfer.prompt.segments import Cutter

from .support import TEXTS, folder, tokenizer


def completion(text: str) -> Prompt:
    return Prompt(
        path="/v1/completions",
        model="m",
        stream=False,
        chat=None,
        text=text,
        token_ids=None,
        add_special_tokens=True,
        cache_salt=None,
        size=len(text),
        prefix=b"",
    )


HELLO = Chat(messages=[{"role": "user", "content": "hello"}])


def test_a_chat_of_documentation_has_the_ids_of_the_reference(
    deepseek: LocalTokenizer, deepseek_reference: tokenizers.Tokenizer
) -> None:
    assert deepseek.name == "gigatoken"
    for i, text in enumerate(TEXTS):
        rendered = deepseek.render(
            Chat(messages=[{"role": "system", "content": TEXTS[i - 1][:500]}, {"role": "user", "content": text}])
        )
        assert text in rendered
        expected = deepseek_reference.encode(rendered, add_special_tokens=False).ids
        assert deepseek.encode(rendered, add_special_tokens=False).tolist() == expected


MARKS = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<|im_start|>", "user\n", "\r\n", "  ", "'s", "\u200d", "1234")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=30), st.sampled_from(MARKS)), max_size=12).map("".join))
def test_any_text_has_the_ids_of_the_reference(
    deepseek: LocalTokenizer, deepseek_reference: tokenizers.Tokenizer, text: str
) -> None:
    ids = deepseek.encode(text, add_special_tokens=False)
    assert ids.dtype == np.uint32
    assert ids.tolist() == deepseek_reference.encode(text, add_special_tokens=False).ids
    assert deepseek.decode(ids) == text.encode()


@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC()])
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_tokens_that_the_post_processor_adds_are_added(
    tmp_path: Path, normalizer: normalizers.Normalizer | None, bos: bool, eos: bool
) -> None:
    reference = tokenizer(normalizer=normalizer, bos=bos, eos=eos)
    local = LocalTokenizer.load(folder(tmp_path, reference), None)
    assert local.name == ("gigatoken" if normalizer is None else "tokenizers")
    for text in ("", "a", "hello <s> world", "</s>", "ﬁ"):
        for add in (False, True):
            assert (
                local.encode(text, add_special_tokens=add).tolist()
                == reference.encode(text, add_special_tokens=add).ids
            )


def test_padding_and_truncation_do_not_apply_to_prompts(tmp_path: Path) -> None:
    made = tokenizer(normalizer=normalizers.Lowercase())
    long = "hello world " * 20
    expected = made.encode(long).ids
    made.enable_truncation(8)
    made.enable_padding(length=512)
    local = LocalTokenizer.load(folder(tmp_path, made), None)
    assert local.encode(long, add_special_tokens=True).tolist() == expected


def test_an_encoder_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = encoders.Gigatoken.encode

    def lying(self: encoders.Gigatoken, text: str) -> TokenIds:
        return honest(self, text)[:20]

    monkeypatch.setattr(encoders.Gigatoken, "encode", lying)
    reference = tokenizer()
    data = reference.to_str().encode()
    with capture_logs() as logs:
        chosen = encoders.choose(
            lambda: gigatoken.Tokenizer.from_json(data), encoders.Reference(reference), [], source="x"
        )
    assert chosen.name == "tokenizers"
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["gigatoken_mismatched"]


def test_a_disputed_character_is_left_to_the_reference(
    deepseek: LocalTokenizer, deepseek_reference: tokenizers.Tokenizer
) -> None:
    text = "A letter since Unicode 17: \ufbc3:A"
    expected = deepseek_reference.encode(text, add_special_tokens=False).ids
    assert deepseek.encode(text, add_special_tokens=False).tolist() == expected
    bare = gigatoken.Tokenizer.from_json(deepseek_reference.to_str().encode())
    assert bare.encode(text).tolist() != expected


def test_gigatoken_is_reloaded_once_it_has_grown_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer()
    resident = iter([1000, 1400, 2001, 1200, 1300, 1900])
    monkeypatch.setattr(encoders, "resident_bytes", lambda: next(resident))
    monkeypatch.setattr(encoders, "_RELOAD_CHECK_BYTES", 10)
    monkeypatch.setattr(encoders, "_MAX_GROWTH_BYTES", 1000)
    with capture_logs() as logs:
        fast = encoders.Gigatoken(lambda: gigatoken.Tokenizer.from_json(made.to_str()), encoders.Reference(made))
        for _ in range(8):
            assert fast.encode("hello").tolist() == made.encode("hello").ids
    assert [entry["event"] for entry in logs] == ["tokenizer_reloaded"]


def test_a_cutter_that_changes_ids_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "cutter_of", lambda *_, **__: Cutter(("e",), shortest=1))
    made = tokenizer()
    with capture_logs() as logs:
        local = LocalTokenizer.load(folder(tmp_path, made), None)
    assert [entry["event"] for entry in logs] == ["tokenizer_cutting_disabled"]
    assert local.encode("hello there", add_special_tokens=False).tolist() == made.encode("hello there").ids


def test_a_longer_prompt_gets_the_hashes_of_its_beginning(deepseek_folder: Path) -> None:
    local = LocalTokenizer.load(deepseek_folder, "chatml", block_size=16, cache_bytes=1_000_000)
    blocks = TokenBlockProcessor(16)
    first = local.tokenize(completion("<｜User｜>" + 9 * TEXTS[0] + "<｜Assistant｜>"))
    hashes = list(blocks.chain(first.ids, hashes=first.hashes))
    again = local.tokenize(completion("<｜User｜>" + 9 * TEXTS[0] + "<｜Assistant｜>" + TEXTS[1]))
    assert again.hashes
    assert again.hashes == hashes[: len(again.hashes)]
    assert local.cache_stats.hit_chars > 0


def test_an_unknown_id_is_an_error_not_a_crash(tmp_path: Path) -> None:
    local = LocalTokenizer.load(folder(tmp_path, tokenizer()), None)
    assert local.decode(np.array([], dtype=np.uint32)) == b""
    with pytest.raises(TokenizeError):
        local.decode(np.array([600], dtype=np.uint32))


@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC()])
def test_text_that_is_not_unicode_is_an_error(tmp_path: Path, normalizer: normalizers.Normalizer | None) -> None:
    local = LocalTokenizer.load(folder(tmp_path, tokenizer(normalizer=normalizer)), None)
    with pytest.raises(TokenizeError):
        local.encode("half \ud800 pair", add_special_tokens=False)


def test_the_file_may_be_named_instead_of_the_folder(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer(), chat_template="T", bos_token="<s>") / "tokenizer.json"
    assert LocalTokenizer.load(path, None).render(HELLO) == "T"


def test_the_configured_template_precedes_the_file_and_the_file_the_configuration_of_the_tokenizer(
    tmp_path: Path,
) -> None:
    path = folder(tmp_path, tokenizer(), chat_template="config")
    assert LocalTokenizer.load(path, None).render(HELLO) == "config"
    (path / "chat_template.jinja").write_text("beside", encoding="utf-8")
    assert LocalTokenizer.load(path, None).render(HELLO) == "beside"
    (path / "mine.jinja").write_text("mine", encoding="utf-8")
    assert LocalTokenizer.load(path, str(path / "mine.jinja")).render(HELLO) == "mine"
    assert LocalTokenizer.load(path, "chatml").render(HELLO).startswith("<|im_start|>user\nhello<|im_end|>\n")


def test_chats_with_tools_take_the_template_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    local = LocalTokenizer.load(folder(tmp_path, tokenizer(), chat_template=named), None)
    assert local.render(HELLO) == "plain"
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f"}}]
    assert local.render(Chat(messages=HELLO.messages, tools=tools)) == "tools"


def test_without_a_template_the_error_says_what_to_do(tmp_path: Path) -> None:
    local = LocalTokenizer.load(folder(tmp_path, tokenizer()), None)
    with pytest.raises(TokenizeError, match="chatTemplate"):
        local.render(HELLO)


def test_special_tokens_come_from_both_files(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        tokenizer(),
        bos_token={"content": "<s>", "lstrip": False},
        pad_token=None,
        extra_special_tokens={"tool_token": "<t>"},
        chat_template="{{ bos_token }}{{ eos_token }}{{ tool_token }}{{ pad_token is defined }}",
    )
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "old", "eos_token": "</s>"}))
    assert LocalTokenizer.load(path, None).render(HELLO) == "<s></s><t>False"


def test_variables_of_the_request_reach_the_template_but_override_nothing(tmp_path: Path) -> None:
    source = "{{ messages[0].content }}{{ mood }}{{ add_generation_prompt }}{{ self is defined }}{{ tools }}"
    local = LocalTokenizer.load(folder(tmp_path, tokenizer(), chat_template=source), None)
    variables = {"mood": "!", "messages": 1, "add_generation_prompt": False, "tools": 1, "self": 1, "no name": 1}
    chat = Chat(messages=HELLO.messages, chat_template_kwargs=variables)
    assert local.render(chat) == "hello!TrueTrueNone"


def test_documents_may_come_as_a_variable(tmp_path: Path) -> None:
    local = LocalTokenizer.load(folder(tmp_path, tokenizer(), chat_template="{{ documents[0].text }}"), None)
    variables = {"documents": [{"text": "variable"}]}
    assert local.render(Chat(messages=HELLO.messages, chat_template_kwargs=variables)) == "variable"
    field = Chat(messages=HELLO.messages, chat_template_kwargs=variables, documents=[{"text": "field"}])
    assert local.render(field) == "field"


def test_content_has_the_form_that_the_template_expects(tmp_path: Path) -> None:
    walking = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    parts = Chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
    for source, expected in ((walking, ("[a][b]", "[hello]")), (plain, ("a\nb", "hello"))):
        local = LocalTokenizer.load(folder(tmp_path, tokenizer(), chat_template=source), None)
        assert (local.render(parts), local.render(HELLO)) == expected


def test_developer_messages_become_system_messages_if_the_template_does_not_know_them(tmp_path: Path) -> None:
    ignorant = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    chat = Chat(messages=[*HELLO.messages, {"role": "developer", "content": "be brief"}])
    for source, expected in (
        (ignorant, "system:be brief;user:hello;"),
        (ignorant + "{# 'developer' #}", "user:hello;developer:be brief;"),
    ):
        local = LocalTokenizer.load(folder(tmp_path, tokenizer(), chat_template=source), None)
        assert local.render(chat) == expected


def test_a_template_of_the_request_is_not_rendered_here(deepseek: LocalTokenizer) -> None:
    with pytest.raises(TokenizeError, match="own chat template"):
        deepseek.render(Chat(messages=HELLO.messages, chat_template="{{ messages }}"))


@pytest.mark.parametrize(
    ("files", "key", "hint"),
    [
        ({}, "tokenizer", "no tokenizer.json"),
        ({"tokenizer.json": b"{"}, "tokenizer", "not a usable tokenizer"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizer", "not a usable tokenizer"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer", "not a JSON object"),
        ({"tokenizer_config.json": b"\xff"}, "tokenizer", "not a JSON object"),
        ({"chat_template.jinja": b"{% if %}"}, "chatTemplate", "does not compile"),
        ({"chat_template.jinja": b"\xff"}, "tokenizer", "not UTF-8"),
    ],
)
def test_what_cannot_be_loaded_is_a_config_error(tmp_path: Path, files: dict[str, bytes], key: str, hint: str) -> None:
    if files and "tokenizer.json" not in files:
        folder(tmp_path, tokenizer())
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=hint) as caught:
        LocalTokenizer.load(tmp_path, None, where="$.models[3]")
    assert caught.value.path == f"$.models[3].{key}"


def test_a_path_that_does_not_exist_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        LocalTokenizer.load(tmp_path / "gpt2", None)
    with pytest.raises(ConfigError, match="cannot read"):
        LocalTokenizer.load(folder(tmp_path, tokenizer()), str(tmp_path / "no.jinja"))


def test_named_templates_are_in_a_separate_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", tokenizer())
    (path / "chat_template.jinja").write_text("plain {{ messages[0].content }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ messages[0].content }}")
    made = LocalTokenizer.load(path, None)
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert made.render(Chat(messages=messages)) == "plain hi"
    assert made.render(Chat(messages=messages, tools=tools)) == "tools hi"


def test_a_reload_that_fails_or_changes_ids_keeps_the_old_tokenizer(
    deepseek_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (deepseek_folder / "tokenizer.json").read_bytes()
    made: list[str] = []

    def load() -> gigatoken.Tokenizer:
        made.append("first" if not made else "again")
        if len(made) == 3:
            raise ValueError("no such file")
        source = data if len(made) < 3 else tokenizer().to_str().encode()
        return gigatoken.Tokenizer.from_json(source)

    exact = encoders.Reference(tokenizers.Tokenizer.from_buffer(data))
    encoder = encoders.Gigatoken(load, exact)
    monkeypatch.setattr(encoders, "_RELOAD_CHECK_BYTES", 0)
    monkeypatch.setattr(encoders, "_MAX_GROWTH_BYTES", -(1 << 60))
    expected = exact.encode("Hello there").tolist()
    with capture_logs() as logs:
        for _ in range(3):  # reloaded, file missing, file changed
            assert encoder.encode("Hello there").tolist() == expected
    assert len(made) == 4
    assert [log.get("reason") for log in logs if log["event"] == "tokenizer_reload_failed"] == [
        "no such file",
        "its file has changed",
    ]


def test_what_old_versions_make_of_a_reasoning_effort_is_not_guessed(deepseek: LocalTokenizer) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    plain, thinking = (
        parse("/v1/chat/completions", json.dumps(each).encode()) for each in (body, {**body, "reasoning_effort": "low"})
    )
    for dialect in (Dialect.VLLM, Dialect.VLLM_24, Dialect.VLLM_UNKNOWN):
        assert deepseek.tokenize(thinking, dialect).ids.tolist()
    assert deepseek.tokenize(plain, Dialect.VLLM_OLD).ids.tolist()
    with pytest.raises(TokenizeError, match="reasoning effort"):
        deepseek.tokenize(thinking, Dialect.VLLM_OLD)


def test_templates_of_engines_do_not_get_reasoning_under_a_third_name(tmp_path: Path) -> None:
    """The versions of transformers that vLLM and SGLang require do not have that yet."""
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[-1].reasoning }}{{ messages[-1].reasoning_content }}{{ messages[-1].thinking }}")
    made = LocalTokenizer.load(folder(tmp_path / "model", tokenizer()), str(template))
    for key in ("reasoning", "reasoning_content"):
        assert made.render(Chat(messages=[{"role": "assistant", "content": "x", key: "hm"}])) == "hmhm"
