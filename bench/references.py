"""Hashing compared with SHA-256 alone, in paired rounds. `bench.tokenization` compares tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from bench.measure import Figure, Scale, each, ratio, rounds_of
from bench.prompts import prose, tokenizer_path
from matrixinfer.blocks import TokenBlockProcessor
from matrixinfer.prompt.local import LocalTokenizer

_BLOCK_BYTES = 128 * 4


def run(scale: Scale) -> Iterator[Figure]:
    """By prompt size."""
    tokenizer = LocalTokenizer.load(tokenizer_path(), "chatml")
    blocks = TokenBlockProcessor()
    for kib in scale.prompt_kib:
        texts = [prose(session, kib * 1024) for session in range(scale.sessions)]
        tokens = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        data = [ids.astype(">u4").tobytes() for ids in tokens]
        calls = each(lambda ids: blocks.chain(ids)[:], tokens), each(_sha256_per_block, data)
        seconds, reference = rounds_of(*calls, scale=scale)
        case = f"hash {kib} KiB (chained, reference: SHA-256 alone)"
        yield Figure(case=case, name="ours", value=min(seconds) / scale.sessions * 1e6, unit="µs")
        yield Figure(case=case, name="reference", value=min(reference) / scale.sessions * 1e6, unit="µs")
        yield Figure(case=case, name="ratio", value=ratio(seconds, reference), unit="×")


def _sha256_per_block(data: bytes) -> list[bytes]:
    """The minimum cost of hashing blocks: without parents and integers."""
    view = memoryview(data)
    return [
        sha256(view[start : start + _BLOCK_BYTES]).digest()
        for start in range(0, len(view) - _BLOCK_BYTES + 1, _BLOCK_BYTES)
    ]
