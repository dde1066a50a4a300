"""Text to token ids: gigatoken where it is exact, Hugging Face `tokenizers` where it is not."""

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
from matrixinfer.prompt.disputed_characters import has_young_characters

T = TypeVar("T")

HARD = (
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
"""Text on which tokenizers tend to differ: blanks, contractions, digits, scripts, joiners, control characters."""

_MAX_SPECIALS = 64

_INLINE_EXACT_BYTES = 2 * 1024

_SHORT_BYTES = 32 * 1024
_LOOK_BYTES = 32 * 1024 * 1024
_MAX_GROWTH_BYTES = 512 * 1024 * 1024


class TakesLong(TokenizeError):
    """This text is not to be encoded on an event loop: it would stand still for long."""


class Encoder(Protocol):
    """One implementation of a tokenizer. Adds no special tokens of its own; finds those in the text."""

    name: str
    inline_bytes: int
    """Text up to this long takes a millisecond at most; one of a single endless word takes ten times that."""
    piece_chars: int
    """Pieces of this length are worth remembering: shorter ones are as well encoded anew."""

    def encode(self, text: str) -> TokenIds:
        """Token ids of `text`, shape (n,). May raise any `Exception`."""
        ...

    def encode_each(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        """Token ids of each of `texts`. May raise any `Exception`."""
        ...

    def decode(self, ids: TokenIds) -> bytes:
        """The bytes that the ids stand for, special tokens included. May raise any `Exception`."""
        ...


class Reference:
    """Hugging Face `tokenizers`: knows every model, a hundred times slower."""

    name = "tokenizers"
    inline_bytes = 2 * 1024
    piece_chars = 64

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> TokenIds:
        """See `Encoder`."""
        return self.encode_each([text])[0]

    def encode_each(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        """See `Encoder`."""
        # Unlike `encode`, the batch call releases the GIL.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: TokenIds) -> bytes:
        """See `Encoder`."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode()


class Gigatoken:
    """64 KB in half a millisecond; byte-level and SentencePiece BPE only.

    Texts with characters on which it may differ go to `exact`: on an event loop short ones only, longer ones raise
    `TakesLong`. `load` makes one, and may be called again; what it raises the first time is raised.
    """

    name = "gigatoken"
    inline_bytes = 128 * 1024
    piece_chars = 8 * 1024

    def __init__(self, load: Callable[[], gigatoken.Tokenizer], exact: Encoder) -> None:
        self._load = load
        self._exact = exact
        with _panics():
            self._tokenizer = load()
        self._bytes = 0
        self._settled = resident_bytes()

    def encode(self, text: str) -> TokenIds:
        """See `Encoder`."""
        return self.encode_each([text])[0]

    def encode_each(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        """See `Encoder`."""
        data = [text.encode() for text in texts]
        young = not all(map(str.isascii, texts)) and has_young_characters(b"".join(data))
        if young and sum(map(len, data)) > _INLINE_EXACT_BYTES and _on_loop():
            raise TakesLong("a character is too young for gigatoken")
        with _panics():
            return [
                self._exact.encode(text) if young and has_young_characters(each) else self._encode(each)
                for text, each in zip(texts, data, strict=True)
            ]

    def _encode(self, utf8: bytes) -> TokenIds:
        self._bytes += len(utf8)
        if self._bytes > _LOOK_BYTES:
            self._look()
        if len(utf8) <= _SHORT_BYTES:
            return self._tokenizer.encode(utf8)
        # `encode` holds the GIL for the whole text; a batch of one does not, and costs 5 µs more.
        rows, lengths = self._tokenizer.encode_batch_padded([utf8], 0, parallel=False)
        return rows[0, : int(lengths[0])]

    def decode(self, ids: TokenIds) -> bytes:
        """See `Encoder`."""
        # gigatoken itself aborts on ids that it does not know.
        if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
            raise ValueError("an id is outside the vocabulary")
        return self._tokenizer.decode(ids)

    def _look(self) -> None:
        """Begin anew where it has grown too large: it remembers every word that it has met, without bound.

        A text of random words costs 9 bytes a byte; 110 MB of source code have cost 9 MB. A new one takes 0.4 s, for which
        it holds the interpreter, so it is made seldom. A file that has changed meanwhile is not taken.
        """
        self._bytes = 0
        resident = resident_bytes()
        if resident - self._settled <= _MAX_GROWTH_BYTES:
            return
        log = structlog.get_logger(__name__)
        try:
            with _panics():
                renewed = self._load()
        except (RuntimeError, ValueError, OSError) as error:
            log.warning("tokenizer.not_renewed", reason=str(error).partition("\n")[0])
        else:
            if all(agree(self._tokenizer.encode, renewed.encode, text.encode()) for text in HARD):
                self._tokenizer = renewed
            else:
                log.warning("tokenizer.not_renewed", reason="its file has changed")
        self._settled = resident_bytes()
        log.info("tokenizer.renewed", resident_bytes=resident, now=self._settled)


def _on_loop() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextmanager
def _panics() -> Iterator[None]:
    """Raise `RuntimeError` for a panic in gigatoken's Rust, which is no `Exception` and would end the process."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"gigatoken panicked: {error}") from error
        raise


def choose(
    load: Callable[[], gigatoken.Tokenizer], exact: Encoder, special_tokens: Sequence[str], *, source: str
) -> Encoder:
    """gigatoken, if its ids equal those of `exact` on every sample, else `exact`.

    Encodes the samples, which also pays for gigatoken's slow first call. `source` names the tokenizer in logs.
    """
    log = structlog.get_logger(__name__).bind(tokenizer=source)
    try:
        fast = Gigatoken(load, exact)
    except (RuntimeError, ValueError) as error:
        log.info("tokenizer.slow", reason=str(error).partition("\n")[0])
        return exact
    some = special_tokens[:_MAX_SPECIALS]
    samples = (*HARD, "a ".join(some), " ".join(some))
    differing = [sample for sample in samples if not agree(fast.encode, exact.encode, sample)]
    if differing:
        log.warning(
            "tokenizer.mismatch", sample=differing[0], differing=len(differing), of=len(samples), used=exact.name
        )
        return exact
    return fast


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell in `/proc`."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * mmap.PAGESIZE


def agree(one: Callable[[T], TokenIds], other: Callable[[T], TokenIds], text: T) -> bool:
    """True when both encode `text` to the same ids. A text that one of them cannot encode is a disagreement."""
    try:
        return np.array_equal(one(text), other(text))
    except Exception:  # noqa: BLE001 - boundary: both are foreign code, and `tokenizers` raises bare Exception
        return False


def added_around(reference: tokenizers.Tokenizer) -> tuple[TokenIds, TokenIds]:
    """The ids that the post-processor puts before and after a text. Raises `ValueError` when it changes more."""
    for probe in ("a", "0", " "):
        plain = reference.encode(probe, add_special_tokens=False).ids
        whole = reference.encode(probe).ids
        if plain:
            break
    for start in range(len(whole) - len(plain) + 1):
        stop = start + len(plain)
        if whole[start:stop] == plain:
            return np.array(whole[:start], dtype=np.uint32), np.array(whole[stop:], dtype=np.uint32)
    raise ValueError("its post-processor changes more than the ends of a text")
