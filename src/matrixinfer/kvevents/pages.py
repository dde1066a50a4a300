"""Pages of a radix tree, as SGLang keeps them.

A page is on a medium or it is not: there are no copies to count, and a removal on a medium is the end of it there. Its
hash says neither salt nor adapter, so pages get ids of their own per namespace. Removals name the hash alone: where several
namespaces hold it, it is not known whose page goes, so they are kept until as many removals have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from matrixinfer.kvevents.wire import BlockStored


class Pages:
    """Where each page is, and which pages share a hash."""

    def __init__(self) -> None:
        self._media: dict[int, set[str]] = {}  # page -> media that it is on
        self._twins: dict[int, list[int]] = {}  # hash -> pages of salts and adapters that have it
        self._removed: dict[tuple[int, str], int] = {}  # removals that may have been of any of several pages
        self.ambiguous = 0
        """Removals that did not say whose page went."""
        self.repeats = 0
        """Pages that were stored again while they were there: a tree does so only for another namespace."""
        self.keeps_twins = True
        """Keep the pages that share a hash until as many removals have come; otherwise one removal ends them all."""

    def __len__(self) -> int:
        return len(self._media)

    def named(self, event: BlockStored, hashes: Sequence[int], parent: int | None) -> tuple[Sequence[int], int | None]:
        """The ids of an event's pages and of their parent."""
        mask = _mask(event)
        if not mask:
            return hashes, parent
        pages = [block ^ mask for block in hashes]
        for block, page in zip(hashes, pages, strict=True):
            twins = self._twins.setdefault(block, [])
            if page not in twins:
                twins.append(page)
        return pages, None if parent is None else parent ^ mask

    def stored(self, pages: Sequence[int], hashes: Sequence[int], medium: str | None) -> list[int]:
        """`pages`, which have these hashes, are on a medium now. Returns those that were there before."""
        again, name = [], medium or "GPU"
        for page, block in zip(pages, hashes, strict=True):
            media = self._media.setdefault(page, set())
            if name in media:
                again.append(page)
                if not self._was_removed(block, name):
                    self.repeats += 1
            media.add(name)
        return again

    def _was_removed(self, block: int, name: str) -> bool:
        """Whether a removal that did not say whose page went was of one that is stored now."""
        removals = self._removed.pop((block, name), 0)
        if removals > 1:
            self._removed[block, name] = removals - 1
        return removals > 0

    def removed(self, hashes: Sequence[int], medium: str | None) -> list[int]:
        """Pages with these hashes left a medium. Returns the ids that were there."""
        gone: list[int] = []
        name = medium or "GPU"
        for block in hashes:
            pages = [page for page in (*self._twins.get(block, ()), block) if name in self._media.get(page, ())]
            if len(pages) > 1 and self.keeps_twins:
                removals = self._removed.get((block, name), 0) + 1
                if removals < len(pages):
                    self._removed[block, name] = removals
                    self.ambiguous += 1
                    continue
                self._removed.pop((block, name), None)
            for page in pages:
                gone.append(page)
                self._media[page].discard(name)
                if not self._media[page]:
                    del self._media[page]
                    self._forget_twin(block, page)
        return gone

    def _forget_twin(self, block: int, page: int) -> None:
        twins = self._twins.get(block)
        if twins is not None and page in twins:
            twins.remove(page)
            if not twins:
                del self._twins[block]

    def clear(self) -> None:
        """Nothing is held any more."""
        self._media.clear()
        self._twins.clear()
        self._removed.clear()


def _mask(event: BlockStored) -> int:
    """What distinguishes the ids of a salt or adapter; 0 for neither."""
    adapter = event.lora_name if isinstance(event.lora_name, str) else ""
    if event.salt is None and not adapter:
        return 0
    name = f"{adapter}\0{event.salt is None}\0{event.salt or ''}"
    return int.from_bytes(sha256(name.encode()).digest()[:8], "big") | 1
