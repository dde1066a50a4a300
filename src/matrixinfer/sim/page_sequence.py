"""One request's tokens, the names of its full pages, and the pages that it uses, as in SGLang."""

from __future__ import annotations

from array import array
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING

from matrixinfer.blocks import TokenIds
from matrixinfer.sim.prefix_cache import Adapter

if TYPE_CHECKING:
    from matrixinfer.sim.radix import Node


class PageSequence:
    """One request's tokens, the names of its full pages, and the pages that it uses."""

    def __init__(
        self,
        tokens: TokenIds,
        page_size: int,
        *,
        pairs: bool = False,
        salt: str | None = None,
        adapter: Adapter | None = None,
        extra_key: str | None = None,
    ) -> None:
        self.tokens = array("I", tokens.astype("u4", copy=False).tobytes())
        self.salt = salt
        self.lora_name = None if adapter is None else adapter.name
        self._page_size = page_size
        self._ahead = int(pairs)
        published = b"" if salt is None and adapter is None else repr((self.lora_name, salt)).encode()
        self._hashes = _Chain(published)
        self._names = self._hashes if extra_key is None else _Chain(published + b"\0" + extra_key.encode())
        self.computed = 0
        """Tokens that are computed."""
        self.prefill = 0
        """Tokens that are computed before any is generated."""
        self.node: Node | None = None
        """Where its pages in the tree end; None while it holds nothing."""
        self.kept = 0
        """Pages from the root to that node."""
        self.own = 0
        """Pages that are not in the tree."""
        self._name_full_pages()

    @property
    def hashes(self) -> list[int]:
        """The published hashes of its full pages."""
        return self._hashes.links

    @property
    def names(self) -> list[int]:
        """What the tree calls its full pages: like the hashes, but the `extra_key` counts, too."""
        return self._names.links

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self._name_full_pages()

    def full_pages(self, tokens: int) -> int:
        """Full pages in the first `tokens` tokens."""
        return max(0, tokens - self._ahead) // self._page_size

    def contents(self, first: int, last: int) -> list[int] | list[tuple[int, int]]:
        """The tokens of the pages [first, last), as events show them."""
        start, end = first * self._page_size, last * self._page_size
        tokens = self.tokens[start : end + self._ahead].tolist()
        return list(pairwise(tokens)) if self._ahead else tokens

    def _name_full_pages(self) -> None:
        size = self._page_size
        for page in range(len(self.hashes), self.full_pages(len(self.tokens))):
            content = self.tokens[page * size : (page + 1) * size + self._ahead].tobytes()
            self._hashes.add(content)
            if self._names is not self._hashes:
                self._names.add(content)


class _Chain:
    """Hashes, each of a page and of the hash before it. Signed, as SGLang publishes them."""

    def __init__(self, seed: bytes) -> None:
        self.links: list[int] = []
        self._last = seed

    def add(self, page: bytes) -> None:
        self._last = sha256(self._last + page).digest()
        self.links.append(int.from_bytes(self._last[:8], "big", signed=True))
