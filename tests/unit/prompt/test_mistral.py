from __future__ import annotations

import hashlib
import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Library
from msgspec.structs import replace

from matrixinfer.errors import ConfigError, TokenizeError
from matrixinfer.prompt.base import Chat, Prompt
from matrixinfer.prompt.mistral import MistralTokenizer
from matrixinfer.prompt.requests import parse

from .mistral_cases import answer, call, chat, parts, requests, result, system, user
from .mistral_vocabularies import NAMES, vocabulary

GOLDEN: dict[str, list[str | None]] = json.loads(Path(__file__).with_name("mistral_golden.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mistral")


@pytest.fixture(scope="module", params=NAMES)
def named(request: pytest.FixtureRequest, folder: Path) -> tuple[str, MistralTokenizer]:
    name: str = request.param
    return name, MistralTokenizer.load(vocabulary(folder / name, name), where="$")


@pytest.fixture(scope="module")
def tekken_file(folder: Path) -> Path:
    return vocabulary(folder / "one", "tekken-v15")


@pytest.fixture(scope="module")
def tekken(tekken_file: Path) -> MistralTokenizer:
    return MistralTokenizer.load(tekken_file, where="$")


def read(body: dict[str, Any]) -> Prompt:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return parse(path, json.dumps(body).encode())


def ids_of(tokenizer: MistralTokenizer, prompt: Prompt) -> list[int]:
    ids: list[int] = tokenizer.tokenize(prompt).ids.tolist()
    return ids[-(prompt.keep_last or 0) :]


def test_the_ids_are_those_of_vllm(named: tuple[str, MistralTokenizer]) -> None:
    name, tokenizer = named
    compared = 0
    for body, expected in zip(requests(), GOLDEN[name], strict=True):
        if expected is not None:  # vLLM refuses the others
            ids = ids_of(tokenizer, read(body))
            assert hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:8] == expected, body
            compared += 1
    assert compared > 150


MARKS = ("[INST]", "<s>", "[TOOL_CALLS]", "\n\n", "  ", "\u200d", "1234", "é", "e\u0301")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=30), st.sampled_from(MARKS)), min_size=1, max_size=8).map("".join))
def test_a_text_has_the_ids_of_the_library_after_the_beginning_of_sequence(
    tekken: MistralTokenizer, tekken_file: Path, text: str
) -> None:
    prompt = replace(read({"model": "m", "prompt": "x"}), text=text)
    library = tekken._library.instruct_tokenizer.tokenizer
    assert ids_of(tekken, prompt) == library.encode(text, bos=True, eos=False)
    assert ids_of(tekken, replace(prompt, add_special_tokens=False)) == library.encode(text, bos=False, eos=False)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=5))
def test_a_conversation_has_the_ids_of_the_library(tekken: MistralTokenizer, texts: list[str]) -> None:
    sent = [system("s")] + [m for text in texts for m in (user(text), answer(text))] + [user("end")]
    turns = [m for text in texts for m in (UserMessage(content=text), AssistantMessage(content=text))]
    request: ChatCompletionRequest[Any] = ChatCompletionRequest(
        messages=[SystemMessage(content="s"), *turns, UserMessage(content="end")]
    )
    expected = tekken._library.encode_chat_completion(request).tokens
    assert ids_of(tekken, replace(read(chat(user("x"))), chat=Chat(messages=sent))) == expected


def test_threads_do_not_disturb_each_other(tekken: MistralTokenizer) -> None:
    prompts = [read(chat(user(f"{i} " * 50))) for i in range(16)]
    expected = [ids_of(tekken, each) for each in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda each: ids_of(tekken, each), prompts)) == expected


def test_only_tool_call_ids_of_responses_keep_their_length(folder: Path) -> None:
    tokenizer = MistralTokenizer.load(vocabulary(folder / "tekken-v11", "tekken-v11"), where="$")
    prompt = read(
        chat(user("w"), answer(None, tool_calls=[call("call_aaaaaaaaa")]), result("call_aaaaaaaaa", "r"), user("y"))
    )
    assert ids_of(tokenizer, prompt)
    with pytest.raises(TokenizeError):
        tokenizer.tokenize(replace(prompt, path="/v1/responses"))


def test_later_system_messages_of_anthropic_requests_join_the_first(tekken: MistralTokenizer) -> None:
    body = {
        "model": "m",
        "max_tokens": 1,
        "system": "one",
        "messages": [user("a"), system("two"), user("b")],
    }
    sent = parse("/v1/messages", json.dumps(body).encode())
    joined = read(chat(system("onetwo"), user("a"), user("b")))
    assert ids_of(tekken, sent) == ids_of(tekken, joined)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (chat(user("w"), chat_template="{{ 1 }}"), "its own chat template"),
        (chat(user([{"type": "image_url", "image_url": {"url": "data:"}}])), "images, audio or video"),
        (chat(user("w"), chat_template_kwargs={"max_length": 3}), "changes how the engine encodes"),
        (chat(user("w"), answer("a")), "ends with an assistant message"),
        (chat(user("w"), add_generation_prompt=False, continue_final_message=True), "not from the assistant"),
    ],
)
def test_chats_that_vllm_does_not_encode_from_messages_are_refused(
    tekken: MistralTokenizer, body: dict[str, Any], why: str
) -> None:
    with pytest.raises(TokenizeError, match=why):
        tekken.tokenize(read(body))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "secret", "content": "secret"}],
        [user(["secret"])],
        [user([{"type": "secret", "text": "secret"}])],
        [user("w"), answer("x", tool_calls=["secret"])],
        [user("w"), answer("x", tool_calls=[{"secret": "secret"}])],
        [user("w"), answer(None, tool_calls=[call("secret", '{"a":"secret"}')]), result("secret!!!", "secret")],
        [user(parts("secret")), answer([{"type": "thinking", "thinking": ["secret"]}]), user("secret")],
        [user("\ud800secret"), {"role": "assistant"}, user("x")],
    ],
)
def test_no_error_quotes_the_prompt(tekken: MistralTokenizer, messages: list[dict[str, Any]]) -> None:
    prompt = replace(read(chat(user("x"))), chat=Chat(messages=messages))
    with pytest.raises(TokenizeError) as caught:
        tekken.tokenize(prompt)
    assert "secret" not in "".join(traceback.format_exception(caught.value, chain=True)).replace(
        "test_no_error_quotes_the_prompt", ""
    )


def test_a_file_that_is_not_a_vocabulary_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "tekken.json"
    for text in ("{}", "[", '{"config": {"version": "v99"}}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"^\$\.models\[0\]\.tokenizer: .*not a usable Mistral tokenizer"):
            MistralTokenizer.load(file, where="$.models[0].tokenizer")


def test_the_library_is_loaded_as_vllm_loads_it(tekken: MistralTokenizer) -> None:
    assert isinstance(tekken._library, Library)
    assert tekken._library.mode.value == "test"
    assert tekken.name == "mistral-common"
