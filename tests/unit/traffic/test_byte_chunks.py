from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matrixinfer.traffic.byte_chunks import CHUNK_BYTES, cut

IMAGE = "data:image/png;base64,"


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": IMAGE + data}}


def body(*messages: Mapping[str, Any]) -> bytes:
    return json.dumps(messages).encode()


def test_text_is_cut_into_full_chunks() -> None:
    chunks = cut(b"x" * (3 * CHUNK_BYTES + 7))
    assert chunks.text == (CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES)
    assert (chunks.text_bytes, chunks.before_media, chunks.media) == (3 * CHUNK_BYTES + 7,) * 2 + ({},)
    assert len(set(chunks.hashes)) == 3
    assert all(0 <= each < 1 << 63 for each in chunks.hashes)
    assert cut(b"").hashes == cut(b"x" * (CHUNK_BYTES - 1)).hashes == ()


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_prompts_share_the_chunks_of_their_common_beginning_only(one: bytes, other: bytes) -> None:
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    first, second = cut(one, has_media=False).hashes, cut(other, has_media=False).hashes
    shared = common // CHUNK_BYTES
    assert first[:shared] == second[:shared]
    assert set(first[shared:]).isdisjoint(second[shared:])


def test_a_salt_shares_nothing() -> None:
    prompt = b"x" * CHUNK_BYTES
    assert len({cut(prompt, salt=salt).hashes for salt in (None, "", "a", "b")}) == 4


def test_an_image_is_one_chunk_whatever_its_size_and_two_images_differ() -> None:
    for size in (4, 100_000):
        data = "A" * size
        one = cut(body(turn("user", image(data), text("y" * 1000))))
        assert one.kinds[:2] == ("image", None)
        assert one.media == {"image": 1}
        assert one.text[0] == one.before_media < 100
        assert one.text_bytes == len(body(turn("user", image(data), text("y" * 1000)))) - len(IMAGE) - size
        other = cut(body(turn("user", image(data[:-1] + "B"), text("y" * 1000))))
        assert set(one.hashes).isdisjoint(other.hashes)


def test_the_next_turn_begins_with_the_chunks_of_the_last_one() -> None:
    first = [turn("system", text("s" * 2000)), turn("user", text("see"), image("AAAA"), text("y" * 2000))]
    longer = [*first, turn("assistant", text("ok")), turn("user", image("BBBB"))]
    before, after = cut(body(*first)), cut(body(*longer))
    assert after.hashes[: len(before.hashes)] == before.hashes
    assert after.media == {"image": 2}


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"detail": "low", "url": "https://x/y.png"}}, "image"),
        ({"type": "input_image", "image_url": IMAGE + "AAAA"}, "image"),
        ({"type": "input_audio", "input_audio": {"format": "wav", "data": "AAAA"}}, "audio"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "audio"),
        ({"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}}, "audio"),
        ({"type": "video_url", "video_url": {"url": "https://x/y.mp4"}}, "video"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}, "image"),
        ({"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}, "image"),
        ({"type": "image_embeds", "image_embeds": "AAAA"}, "image"),
    ],
)
def test_media_of_every_api_are_recognised(part: dict[str, Any], kind: str) -> None:
    for separators in ((", ", ": "), (",", ":")):
        prompt = json.dumps([turn("user", text("a"), part)], separators=separators).encode()
        assert cut(prompt).media == {kind: 1}


@pytest.mark.parametrize(
    "part",
    [
        text(json.dumps(image("AAAA"))),
        text('"image_url": "data:'),
        {"type": "image_url", "image_url": None, "uuid": "u"},
        {"type": "tool_use", "input": {"url": "https://x"}},
    ],
)
def test_what_only_looks_like_a_medium_is_text(part: dict[str, Any]) -> None:
    assert cut(body(turn("user", part))).media == {}


def test_a_medium_in_plain_text_is_text() -> None:
    assert cut(body(turn("user", image("AAAA"))), has_media=False).media == {}
    assert cut(b'[{"image_url": "data:').media == {}  # it does not end


def test_the_chunks_are_bounded_and_everything_is_counted() -> None:
    prompt = body(turn("user", text("x" * 5000), image("A" * 10), text("y" * 5000), image("B" * 10)))
    chunks, whole = cut(prompt, most=3), cut(prompt)
    assert chunks.hashes == whole.hashes[:3]
    assert (chunks.text_bytes, chunks.media, chunks.before_media) == (
        whole.text_bytes,
        whole.media,
        whole.before_media,
    )
