"""A radix tree of pages that behaves like SGLang's prefix cache (0.5.23, full attention).

It copies the behaviour, including the order of evictions:
- A node holds consecutive pages. It is split where a prompt leaves it.
- A prompt's pages enter the tree when they are computed, a reply's when the request ends. Pages that are there already
  are not stored again: there are no copies.
- Salts, adapters and a client's `extra_key` have trees of their own. Salt and adapter are part of a page's published
  hash; `extra_key` is in no event.
- Unused leaves are evicted whole, least recently used first, a node before its parent.

With `pairs`, as for EAGLE, a page holds pairs of a token and the token after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from matrixinfer.blocks import TokenIds
from matrixinfer.sim.page_sequence import PageSequence
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.radix_events import AllBlocksCleared, BlockRemoved, BlockStored, Event

_GPU = "GPU"


class Node:
    """Consecutive pages of the tree. The root has none, and is its own parent."""

    __slots__ = ("children", "hashes", "names", "number", "parent", "used", "users")

    def __init__(self, names: list[int], hashes: list[int], parent: Node | None, number: int, *, used: int = 0) -> None:
        self.names = names
        self.hashes = hashes
        self.parent = parent or self
        self.number = number
        self.children: dict[int, Node] = {}
        """By the name of their first page."""
        self.users = 0
        self.used = used
        """When it was used last, in turns of the cache."""

    @property
    def evictable(self) -> bool:
        """Whether nobody uses it, and nothing follows it."""
        return not self.users and not self.children and self.parent is not self


class PageHit(NamedTuple):
    """The pages of a prefix, from the root to `node`."""

    node: Node
    pages: int
    tokens: int


class RadixCache:
    """`num_pages` pages of `page_size` tokens."""

    def __init__(self, num_pages: int, page_size: int, *, pairs: bool = False, prefix_caching: bool = True) -> None:
        if min(num_pages, page_size) < 1:
            raise ValueError(f"expected at least 1 page of at least 1 token, got {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.block_size = page_size
        self._pairs = pairs
        self._prefix_caching = prefix_caching
        self._events: list[Event] = []
        self._turn = self._nodes = 0
        self._clear()

    @property
    def capacity(self) -> int:
        """Tokens that fit at the same time."""
        return self.num_pages * self.block_size

    @property
    def usage(self) -> float:
        """Share of pages that running requests use, 0 to 1. Pages that are only cached do not count."""
        return 1 - (self._free + self._unused) / self.num_pages

    def sequence(
        self,
        tokens: TokenIds,
        salt: str | None = None,
        adapter: Adapter | None = None,
        extra_key: str | None = None,
        _media: object = (),
    ) -> PageSequence:
        """A new sequence that holds nothing yet."""
        return PageSequence(tokens, self.block_size, pairs=self._pairs, salt=salt, adapter=adapter, extra_key=extra_key)

    def new_step(self) -> bool:
        """Only a release makes room."""
        return False

    def chunk(self, _sequence: PageSequence, _start: int, count: int, _most: int) -> int:
        """All tokens that the step has room for."""
        return count

    def lookup(self, sequence: PageSequence) -> PageHit:
        """Find the pages of the longest prefix, of all tokens but the last, and count them as used now."""
        node, pages = self._walk(sequence.names[: sequence.full_pages(len(sequence.tokens) - 1)])
        return PageHit(node, pages, pages * self.block_size)

    def load(self, _sequence: PageSequence, _hit: PageHit) -> int:
        """There is no slower tier."""
        return 0

    def report(self, _sequence: PageSequence, _hit: PageHit) -> None:
        """SGLang never reports pages that it reuses."""

    def fits(self, sequence: PageSequence, hit: PageHit) -> bool:
        """Whether all of `sequence` fits now, given what `lookup` found."""
        return self._lacking(sequence, len(sequence.tokens), hit) <= self._room(hit)

    def allocate(self, sequence: PageSequence, computed: int, hit: PageHit | None = None) -> bool:
        """Make room for the first `computed` tokens; evicts where needed. See `PrefixCache.allocate`."""
        if sequence.node is None:
            hit = hit or PageHit(self._root, 0, 0)
        lacking = self._lacking(sequence, computed, hit)
        if lacking > self._room(hit):
            return False
        if hit is not None:
            self._use(hit.node)
            sequence.node, sequence.kept, sequence.computed = hit.node, hit.pages, hit.tokens
            sequence.prefill = len(sequence.tokens)
        self._evict(lacking - self._free)
        self._free -= lacking
        sequence.own += lacking
        return True

    def computed(self, sequence: PageSequence, tokens: int) -> None:
        """The first `tokens` tokens are computed. A prompt's pages enter the tree."""
        sequence.computed = tokens
        if tokens <= sequence.prefill:
            self._insert(sequence)

    def release(self, sequence: PageSequence, *, preempted: bool = False) -> None:
        """Give up the sequence's pages. What it computed stays in the tree, unless it is `preempted`."""
        if sequence.node is None:
            return
        if not preempted:
            self._insert(sequence)
        self._free += sequence.own
        self._unuse(sequence.node)
        sequence.node, sequence.kept, sequence.own, sequence.computed = None, 0, 0, 0

    def reset(self) -> bool:
        """Clear the cache. Returns False, and changes nothing, while any page is in use."""
        if self._free + self._unused < self.num_pages:
            return False
        self._clear()
        return True

    def take_events(self) -> list[Event]:
        """Return the events since the last call, in order. The very first is `AllBlocksCleared`."""
        events, self._events = self._events, []
        return events

    def _clear(self) -> None:
        self._root = Node([], [], None, 0)
        self._leaves: dict[Node, None] = {}
        self._free = self.num_pages
        self._unused = 0  # pages in the tree that nobody uses
        if self._prefix_caching:
            self._events.append(AllBlocksCleared())

    def _lacking(self, sequence: PageSequence, computed: int, hit: PageHit | None) -> int:
        kept = sequence.kept if hit is None else hit.pages
        return max(0, -(-computed // self.block_size) - kept - sequence.own)

    def _room(self, hit: PageHit | None) -> int:
        """Pages that are free or can be evicted, if the pages of `hit` stay."""
        spared = 0 if hit is None else sum(len(node.names) for node in _path(hit.node) if not node.users)
        return self._free + self._unused - spared

    def _walk(self, names: list[int]) -> tuple[Node, int]:
        """Follow `names` from the root, splitting the node in which they end. Returns the last node and the pages."""
        self._turn += 1
        node, pages = self._root, 0
        while pages < len(names) and (child := node.children.get(names[pages])) is not None:
            child.used = self._turn
            same = _common(child.names, names[pages : pages + len(child.names)])
            node = child if same == len(child.names) else self._split(child, same)
            pages += same
            if node is not child:
                break
        return node, pages

    def _split(self, node: Node, pages: int) -> Node:
        """Put the first `pages` pages of `node` into a new node before it."""
        self._nodes += 1
        head = Node(node.names[:pages], node.hashes[:pages], node.parent, self._nodes, used=node.used)
        head.users = node.users
        node.parent.children[head.names[0]] = head
        node.names, node.hashes, node.parent = node.names[pages:], node.hashes[pages:], head
        head.children[node.names[0]] = node
        return head

    def _insert(self, sequence: PageSequence) -> None:
        """Put the computed full pages of `sequence` into the tree. It gives up those that are there already."""
        if not self._prefix_caching or sequence.node is None:
            return
        pages = max(sequence.kept, sequence.full_pages(sequence.computed))
        node, shared = self._walk(sequence.names[:pages])
        if shared < pages:
            node = self._add(sequence, node, shared, pages)
        self._free += shared - sequence.kept
        sequence.own -= pages - sequence.kept
        self._use(node)
        self._unuse(sequence.node)
        sequence.node, sequence.kept = node, pages

    def _add(self, sequence: PageSequence, parent: Node, first: int, last: int) -> Node:
        """Add the pages [first, last) of `sequence` below `parent`."""
        self._nodes += 1
        node = Node(sequence.names[first:last], sequence.hashes[first:last], parent, self._nodes, used=self._turn)
        parent.children[node.names[0]] = node
        self._leaves.pop(parent, None)
        self._leaves[node] = None
        self._unused += len(node.names)
        event = BlockStored(
            block_hashes=node.hashes.copy(),
            parent_block_hash=sequence.hashes[first - 1] if first else None,
            token_ids=sequence.contents(first, last),
            block_size=self.block_size,
            lora_id=None,
            medium=_GPU,
            cache_salt=sequence.salt,
            lora_name=sequence.lora_name,
        )
        before = self._events[-1] if self._events else None
        if isinstance(before, BlockStored) and event.continues(before):
            before.block_hashes += event.block_hashes
            before.token_ids += event.token_ids  # type: ignore[operator] # both hold tokens, or both pairs
        else:
            self._events.append(event)
        return node

    def _use(self, node: Node) -> None:
        for each in _path(node):
            if not each.users:
                self._unused -= len(each.names)
                self._leaves.pop(each, None)
            each.users += 1

    def _unuse(self, node: Node) -> None:
        for each in _path(node):
            each.users -= 1
            if not each.users:
                self._unused += len(each.names)
                if each.evictable:
                    self._leaves[each] = None

    def _evict(self, pages: int) -> None:
        while pages > 0:
            leaf = min(self._leaves, key=lambda node: (node.used, node.number))
            del self._leaves[leaf], leaf.parent.children[leaf.names[0]]
            if leaf.parent.evictable:
                self._leaves[leaf.parent] = None
            self._free += len(leaf.names)
            self._unused -= len(leaf.names)
            pages -= len(leaf.names)
            before = self._events[-1] if self._events else None
            if isinstance(before, BlockRemoved):
                before.block_hashes += leaf.hashes
            else:
                self._events.append(BlockRemoved(block_hashes=leaf.hashes.copy(), medium=_GPU))


def _path(node: Node) -> Iterator[Node]:
    """The nodes from `node` up to the root, without it."""
    while node.parent is not node:
        yield node
        node = node.parent


def _common(one: list[int], other: list[int]) -> int:
    """The length of the common prefix."""
    if one == other:
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
