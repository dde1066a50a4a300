"""Outlines of prompts with media: what they are made of, and what media are told apart by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.chat_template import ChatTemplate
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.multimodal import with_media
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.prompt.outline import Outline, contents_of, expand, media_kwargs
from matrixinfer.prompt.requests import parse

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}[IMG]{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def image(url: str = "data:image/png;base64,AAAA", **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **more}


def chat(*parts: object) -> Chat:
    return Chat(messages=[{"role": "user", "content": [{"type": "text", "text": "look"}, *parts, "and?"]}])


def test_media_with_equal_bytes_have_one_digest_and_others_differ() -> None:
    contents = contents_of(chat(image(), image("data:image/png;base64,BBBB"), image(), image("https://x/a", uuid="u")))
    assert contents is not None
    assert contents[0] == contents[2]
    assert len(set(contents)) == 3
    assert contents_of(chat(image(uuid="u"))) not in (contents_of(chat(image())), contents_of(chat(image(uuid="v"))))


@pytest.mark.parametrize("alone", [{"image_url": None}, {"image_url": {"url": "https://x/a"}}], ids=["nil", "url"])
def test_what_was_sent_with_a_uuid_is_found_by_the_uuid_alone(alone: dict[str, Any]) -> None:
    sent, again = contents_of(chat(image(uuid="u"))), contents_of(chat({"type": "image_url", "uuid": "u", **alone}))
    assert sent is not None
    assert again is not None
    names = Outline(ids=np.array([9], dtype=np.uint32), contents=sent).names_of(0)
    assert names == (sent[0], again[0])
    assert Outline(ids=np.array([9], dtype=np.uint32), contents=again).names_of(0) == again


@pytest.mark.parametrize(
    "parts",
    [
        [image("https://x/a.png")],
        [image("file:///a.png")],
        [image(), {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
        [{"type": "image_embeds", "image_embeds": "AAAA"}],
        [image(), {"type": "odd"}],
    ],
    ids=["url", "file", "two kinds", "embeddings", "unknown"],
)
def test_media_whose_content_is_not_in_the_request_have_no_digest(parts: list[Any]) -> None:
    assert contents_of(chat(*parts)) is None


def test_the_template_writes_its_own_placeholders() -> None:
    template = ChatTemplate(TEMPLATE)
    assert template.takes_parts(Dialect.VLLM)
    assert with_media(chat(image(), image()), template.render) == "<user>look[IMG][IMG]and?"


def test_a_placeholder_becomes_the_tokens_of_its_medium() -> None:
    ids = np.array([1, 9, 2, 9], dtype=np.uint32)
    assert expand(ids, [1, 3], [[9, 9, 9], [9, 8]]) == [1, 9, 9, 9, 2, 9, 8]


@pytest.mark.parametrize(("body", "sets"), [(b'{"mm_processor_kwargs": {}}', True), (b'{"model": "m"}', False)])
def test_options_for_the_processor_are_seen(body: bytes, sets: bool) -> None:
    assert media_kwargs(body) is sets


def test_a_tokenizer_gives_the_outline_of_a_chat_with_images(deepseek_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "parts.jinja"
    path.write_text(TEMPLATE)
    local = LocalTokenizer.load(deepseek_folder, str(path))

    def tokens(url: str) -> Any:
        body = '{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"look at"},'
        body += f'{{"type":"image_url","image_url":{{"url":"{url}"}}}},{{"type":"text","text":"what?"}}]}}]}}'
        return local.tokenize(parse(CHAT_PATH, body.encode()))

    known = tokens("data:image/png;base64,AAAA")
    assert not known.complete
    assert local.decode(known.outline.ids) == b"<user>look at[IMG]what?"
    assert len(known.outline.contents) == 1
    assert tokens("https://x/a.png").outline is None
