"""The tokens of a run of engine blocks, in pages of one size.

A byte string that grows and shrinks keeps room in reserve, and leaves holes that no other string fits into. Pages are
exact, and each fits where another was.
"""

from __future__ import annotations

_PAGE = 1_024
"""Tokens per page."""
_PAGE_BYTES = _PAGE * 4


class Tokens:
    """A sequence of tokens, four bytes each, that grows and shrinks at its end.

    The last of them, which are not in a page yet, are the tail.
    """

    __slots__ = ("_paged", "_pages", "_tail", "count")

    def __init__(self) -> None:
        self.count = 0
        """The number of tokens."""
        self._pages: list[bytes] = []
        self._paged = 0  # tokens in pages
        self._tail = bytearray()

    def append(self, tokens: bytes | bytearray) -> None:
        """Append tokens to the tail."""
        self._tail += tokens
        self.count += len(tokens) // 4

    def since(self, first: int) -> memoryview:
        """The tokens from `first` on. Nothing may be appended or cut before the view is released."""
        at = (first - self._paged) * 4
        return memoryview(self._tail)[at:] if at >= 0 else memoryview(self.part(first, self.count))

    def part(self, first: int, last: int) -> bytes:
        """The tokens [first, last)."""
        paged = self._paged
        if first >= paged:
            return bytes(self._tail[(first - paged) * 4 : (last - paged) * 4])
        page, start = divmod(first, _PAGE)
        end = last - page * _PAGE
        if end <= _PAGE:
            return self._pages[page][start * 4 : end * 4]
        parts = self._pages[page : -(-last // _PAGE)]
        if last > paged:
            parts.append(bytes(self._tail[: (last - paged) * 4]))
        return b"".join(parts)[start * 4 : end * 4]

    def page(self, settled: int) -> None:
        """Move as many of the first `settled` tokens to pages as fill whole ones."""
        count = (settled - self._paged) // _PAGE
        if count <= 0:
            return
        end = count * _PAGE_BYTES
        with memoryview(self._tail) as view:
            self._pages += [bytes(view[at : at + _PAGE_BYTES]) for at in range(0, end, _PAGE_BYTES)]
            tail = bytearray(view[end:])
        self._tail = tail
        self._paged += count * _PAGE

    def cut(self, count: int, settled: int) -> None:
        """Drop all tokens but the first `count`. No more than the first `settled` stay in pages."""
        self.count = count
        if settled < self._paged:
            pages = settled // _PAGE
            self._tail = bytearray(self.part(pages * _PAGE, count))
            del self._pages[pages:]
            self._paged = pages * _PAGE
            return
        tail = self._tail
        del tail[(count - self._paged) * 4 :]
        if tail.__alloc__() > len(tail) * 9 // 8 + 64:  # or up to half of it would stay unused
            self._tail = bytearray(tail)
