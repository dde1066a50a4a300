from __future__ import annotations

import json

import pytest

from matrixinfer.traffic.byte_chunks import CHUNK_BYTES, cut
from matrixinfer.traffic.prompt_sizes import BYTES_PER_TOKEN, MEDIUM_TOKENS, PromptSizes, Rates


def test_the_defaults_hold_until_something_is_learned() -> None:
    rates = PromptSizes().of("m")
    assert rates.bytes_per_token == BYTES_PER_TOKEN
    assert rates.tokens(4000, {"image": 2, "video": 1}) == 1000 + 2 * MEDIUM_TOKENS["image"] + MEDIUM_TOKENS["video"]


def test_bytes_per_token_are_learned_for_each_model() -> None:
    sizes = PromptSizes()
    for _ in range(5):
        sizes.learn("m", 1000, text_bytes=2500, media={})
    assert sizes.of("m").bytes_per_token == pytest.approx(2.5, abs=0.1)
    assert sizes.of("n").bytes_per_token == BYTES_PER_TOKEN
    for _ in range(60):
        sizes.learn("m", 1000, text_bytes=6000, media={})
    assert sizes.of("m").bytes_per_token == pytest.approx(6.0, abs=0.2)
    sizes.keep_models({"n"})
    assert len(sizes) == 0


def test_what_a_medium_takes_is_learned_from_prompts_with_one_kind() -> None:
    sizes = PromptSizes()
    for _ in range(40):
        sizes.learn("m", 50 + 2 * 300 + 100, text_bytes=400, known=50, media={"image": 2})
        sizes.learn("m", 9999, text_bytes=400, media={"image": 1, "audio": 1})
    assert sizes.of("m").medium("image") == pytest.approx(300, rel=0.05)
    assert sizes.of("m").medium("audio") == MEDIUM_TOKENS["audio"]


def test_no_answer_leads_to_an_absurd_estimate() -> None:
    sizes = PromptSizes()
    for _ in range(1000):
        sizes.learn("m", 1, text_bytes=1_000_000, media={})
        sizes.learn("n", 1_000_000, text_bytes=1, media={})
        sizes.learn("n", 0, text_bytes=1, media={"image": 1})
    assert sizes.of("m").bytes_per_token == 16
    assert (sizes.of("n").bytes_per_token, sizes.of("n").medium("image")) == (1, 1)


def test_models_are_bounded() -> None:
    sizes = PromptSizes()
    for number in range(1100):
        sizes.learn(str(number), 100, text_bytes=200, media={})
    assert len(sizes) == 1024
    assert sizes.of("0").bytes_per_token == BYTES_PER_TOKEN
    assert sizes.of("1099").bytes_per_token < BYTES_PER_TOKEN


def test_the_ends_of_chunks_follow_what_is_known() -> None:
    rates = Rates()
    chunks = cut(b"x" * 4 * CHUNK_BYTES)
    assert rates.ends(chunks, 0, 0) == [128, 256, 384, 512]
    assert rates.ends(chunks, 1024, 4 * CHUNK_BYTES) == [256, 512, 768, 1024]
    assert rates.ends(chunks, 100, 2 * CHUNK_BYTES) == [50, 100, 228, 356]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    chunks = cut(json.dumps([image, "y" * 2 * CHUNK_BYTES]).encode())
    first, second, *_ = rates.ends(chunks, 7, chunks.before_media)
    assert (first, second) == (1007, 1135)
