"""Encodes text to token ids: gigatoken where it is exact, Hugging Face `tokenizers` everywhere else."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import gigatoken
import numpy as np
import structlog
import tokenizers

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.disputed_characters import has_disputed_characters

T = TypeVar("T")

TRICKY_TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  leading, trailing and  double  ",
    "line\nbreaks\r\n\n\n\ttabs \t \n end",
    "it's we'll I'VE don\u2019t",
    "1234567890 3.14159 0x7f 1_000 \u0661\u0662\u0663",
    "def f(x: int) -> str:\n    return f'{x!r}'\n\n\nclass A:\n\tpass",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "n": [1, -2.5e3]}}',
    "naïve café \u0065\u0301 Ⅳ ﬁ ½ ẞ İ",
    "今天天气怎么样？ 日本語のテキスト 한국어 ไทย हिन्दी עברית العربية",
    "👩‍👩‍👧‍👦 🇨🇭 ☕\ufe0f 🏳️‍🌈",
    "zero\u200bwidth \ufeffbom \u00a0nbsp \u3000wide \x00\x01\x7f control",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!????---===~~~",
)
"""Texts on which tokenizers tend to differ: blanks, contractions, digits, scripts, joiners, control characters."""

_MAX_SPECIALS = 64

_INLINE_EXACT_BYTES = 2 * 1024

_IDS_AT_ONCE = 32 * 1024
_SHORT_BYTES = 32 * 1024
_RELOAD_CHECK_BYTES = 32 * 1024 * 1024
_MAX_GROWTH_BYTES = 512 * 1024 * 1024


class NeedsThread(TokenizeError):
    """Encoding this text would block the event loop for too long; encode it in a thread."""


class Encoder(Protocol):
    """One implementation of a tokenizer. It adds no special tokens, but recognizes those in the text."""

    name: str
    inline_bytes: int
    """Text up to this size takes at most a millisecond, or ten if it is a single endless word."""
    piece_chars: int
    """The shortest piece worth caching, in characters: shorter ones are just as fast to encode again."""

    def encode(self, text: str) -> TokenIds:
        """The token ids of `text`, shape (n,). May raise any `Exception`."""
        ...

    def encode_each(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        """The token ids of each of `texts`, each of shape (n,). May raise any `Exception`."""
        ...

    def decode(self, ids: TokenIds) -> bytes:
        """The bytes that the ids encode, including special tokens. May raise any `Exception`."""
        ...


class Reference:
    """Hugging Face `tokenizers`: supports every model, but is a hundred times slower than gigatoken."""

    name = "tokenizers"
    inline_bytes = 2 * 1024
    piece_chars = 64

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> TokenIds:
        return self.encode_each([text])[0]

    def encode_each(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        # Unlike `encode`, the batch call releases the GIL.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [_array(encoding.ids) for encoding in encodings]

    def decode(self, ids: TokenIds) -> bytes:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode()


def _array(ids: Sequence[int]) -> TokenIds:
    """The ids as an array; converted in parts, between which other threads may run."""
    array = np.empty(len(ids), dtype=np.uint32)
    for start in range(0, len(ids), _IDS_AT_ONCE):
        array[start : start + _IDS_AT_ONCE] = ids[start : start + _IDS_AT_ONCE]
    return array


class Gigatoken:
    """gigatoken: encodes 64 KB in half a millisecond; supports byte-level and SentencePiece BPE only.

    Texts with disputed characters go to `exact`. On an event loop that is done for short texts only; longer ones raise
    `NeedsThread`. `load` creates the tokenizer and may be called again later; the constructor raises what it raises.
    """

    name = "gigatoken"
    inline_bytes = 128 * 1024
    piece_chars = 8 * 1024

    def __init__(self, load: Callable[[], gigatoken.Tokenizer], exact: Encoder) -> None:
        self._load = load
        self._exact = exact
        with _panics():
            self._tokenizer = load()
        self._bytes_since_check = 0
        self._resident_after_load = resident_bytes()

    def encode(self, text: str) -> TokenIds:
        return self.encode_each([text])[0]

    def encode_each(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        data = [text.encode() for text in texts]
        disputed = not all(map(str.isascii, texts)) and has_disputed_characters(b"".join(data))
        if disputed and sum(map(len, data)) > _INLINE_EXACT_BYTES and _on_loop():
            raise NeedsThread("the text has characters that gigatoken may encode differently")
        with _panics():
            return [
                self._exact.encode(text) if disputed and has_disputed_characters(each) else self._encode(each)
                for text, each in zip(texts, data, strict=True)
            ]

    def _encode(self, utf8: bytes) -> TokenIds:
        self._bytes_since_check += len(utf8)
        if self._bytes_since_check > _RELOAD_CHECK_BYTES:
            self._reload_if_grown()
        if len(utf8) <= _SHORT_BYTES:
            return self._tokenizer.encode(utf8)
        # `encode` holds the GIL for the whole text; a batch of one does not, and costs 5 µs more.
        rows, lengths = self._tokenizer.encode_batch_padded([utf8], 0, parallel=False)
        return rows[0, : int(lengths[0])]

    def decode(self, ids: TokenIds) -> bytes:
        # gigatoken aborts the process on unknown ids.
        if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
            raise ValueError("an id is outside the vocabulary")
        return self._tokenizer.decode(ids)

    def _reload_if_grown(self) -> None:
        """Replace the tokenizer once it has grown too large: it caches every word that it sees, without bound.

        Random words cost 9 bytes per byte of text; 110 MB of source code cost 9 MB. Loading a new one takes 0.4 s and
        holds the GIL, so it happens rarely. If its file has changed meanwhile, the old one is kept.
        """
        self._bytes_since_check = 0
        resident = resident_bytes()
        if resident - self._resident_after_load <= _MAX_GROWTH_BYTES:
            return
        log = structlog.get_logger(__name__)
        reason: str | None = None
        try:
            with _panics():
                reloaded = self._load()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
        else:
            if all(agree(self._tokenizer.encode, reloaded.encode, text.encode()) for text in TRICKY_TEXTS):
                self._tokenizer = reloaded
            else:
                reason = "its file has changed"
        self._resident_after_load = resident_bytes()
        if reason is None:
            log.info("tokenizer_reloaded", resident_bytes=resident, now=self._resident_after_load)
        else:
            log.warning("tokenizer_reload_failed", reason=reason)


def _on_loop() -> bool:
    """Whether an event loop is running in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextmanager
def _panics() -> Iterator[None]:
    """Turn a panic in gigatoken's Rust code into `RuntimeError`: as a bare `BaseException` it would end the process."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"gigatoken panicked: {error}") from error
        raise


def choose(
    load: Callable[[], gigatoken.Tokenizer], exact: Encoder, special_tokens: Sequence[str], *, source: str
) -> Encoder:
    """Choose gigatoken if its ids equal those of `exact` on every sample, else `exact`.

    Encoding the samples also absorbs gigatoken's slow first call. `source` names the tokenizer in logs.
    """
    log = structlog.get_logger(__name__).bind(tokenizer=source)
    try:
        fast = Gigatoken(load, exact)
    except (RuntimeError, ValueError) as error:
        log.info("gigatoken_refused", reason=str(error).partition("\n")[0])
        return exact
    some = special_tokens[:_MAX_SPECIALS]
    samples = (*TRICKY_TEXTS, "a ".join(some), " ".join(some))
    differing = [sample for sample in samples if not agree(fast.encode, exact.encode, sample)]
    if differing:
        log.warning(
            "gigatoken_mismatched", sample=differing[0], differing=len(differing), of=len(samples), used=exact.name
        )
        return exact
    return fast


def resident_bytes() -> int:
    """Resident memory of this process; 0 if `/proc` does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * mmap.PAGESIZE


def agree(one: Callable[[T], TokenIds], other: Callable[[T], TokenIds], text: T) -> bool:
    """True when both encode `text` to the same ids. If either of them fails, they disagree."""
    try:
        return np.array_equal(one(text), other(text))
    except Exception:  # noqa: BLE001 - boundary: both are foreign code, and `tokenizers` raises bare Exception
        return False


def added_around(reference: tokenizers.Tokenizer) -> tuple[TokenIds, TokenIds]:
    """The ids that the post-processor adds before and after a text. Raises `ValueError` if it changes anything else."""
    for probe in ("a", "0", " "):
        plain = reference.encode(probe, add_special_tokens=False).ids
        whole = reference.encode(probe).ids
        if plain:
            break
    for start in range(len(whole) - len(plain) + 1):
        stop = start + len(plain)
        if whole[start:stop] == plain:
            return np.array(whole[:start], dtype=np.uint32), np.array(whole[stop:], dtype=np.uint32)
    raise ValueError("its post-processor changes more than the start and the end of a text")
