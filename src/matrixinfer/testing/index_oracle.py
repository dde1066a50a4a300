"""The oracle of `BlockIndexConformance`, a plain dict of sets, and the histories that it is tried with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

from hypothesis import strategies as st

from matrixinfer.index.base import BlockIndex

MODELS = ("llama", "qwen")
PODS = ("pod-a", "pod-b", "pod-c")
ENDS = ("pod-a~ends", "pod-b@dp1~ends")
"""Names of reusable ends, of which no endpoint needs to hold a block."""


def name_of(node: int) -> int:
    """A block hash: 63 bits, spread over their range."""
    return (node + 1) * 0x9E3779B97F4A7C15 & (2**63 - 1)


@dataclass(frozen=True)
class Tree:
    """Blocks that follow each other: `parents[n]` is the block before block n, None at a root."""

    parents: tuple[int | None, ...]

    def path(self, node: int) -> list[int]:
        """The chain of hashes from the root to `node`."""
        chain: list[int] = []
        at: int | None = node
        while at is not None:
            chain.append(name_of(at))
            at = self.parents[at]
        return chain[::-1]

    def below(self, node: int) -> list[int]:
        """The hashes of `node` and of all that follow it, the last ones first."""
        nodes = {node}
        for child, parent in enumerate(self.parents):  # a block comes after its parent
            if parent in nodes:
                nodes.add(child)
        return [name_of(child) for child in sorted(nodes, reverse=True)]


@dataclass(frozen=True)
class Add:
    """A pod stores the chain up to `node`, but for its first `skip` blocks where it holds them."""

    model: str
    pod: str
    node: int
    skip: int


@dataclass(frozen=True)
class Remove:
    """A pod evicts `node`; an engine whose chains have no holes evicts all that follows it as well."""

    model: str
    pod: str
    node: int


@dataclass(frozen=True)
class Mark:
    """Blocks with reusable ends in them, in any order, appear or disappear under a name of ends."""

    model: str
    name: str
    nodes: tuple[int, ...]
    is_gone: bool


@dataclass(frozen=True)
class Clear:
    """A pod, or a name of ends, loses everything, or goes for good."""

    pod: str
    forget: bool


Operation: TypeAlias = Add | Remove | Mark | Clear


class Model:
    """The oracle: which blocks each pod holds of each model."""

    def __init__(self, tree: Tree, *, prefix_closed: bool) -> None:
        self.tree = tree
        self.prefix_closed = prefix_closed
        self.held: dict[tuple[str, str], set[int]] = {(model, pod): set() for model in MODELS for pod in (*PODS, *ENDS)}

    def apply(self, operation: Operation, index: BlockIndex) -> None:
        """Do the same to the oracle and to the index."""
        if isinstance(operation, Add):
            self._add(operation, index)
        elif isinstance(operation, Remove):
            gone = self.tree.below(operation.node) if self.prefix_closed else [name_of(operation.node)]
            self.held[operation.model, operation.pod].difference_update(gone)
            index.remove(operation.model, operation.pod, gone)
        elif isinstance(operation, Mark):
            self._mark(operation, index)
        else:
            for model in MODELS:
                self.held[model, operation.pod].clear()
            (index.forget if operation.forget else index.clear)(operation.pod)

    def _add(self, operation: Add, index: BlockIndex) -> None:
        chain = self.tree.path(operation.node)
        skip = operation.skip
        if self.prefix_closed:
            skip = min(skip, self.count(operation.model, chain).get(operation.pod, 0))
        self.held[operation.model, operation.pod].update(chain[skip:])
        index.add(operation.model, operation.pod, chain[skip:], chain[skip - 1] if 0 < skip <= len(chain) else None)

    def _mark(self, operation: Mark, index: BlockIndex) -> None:
        held, hashes = self.held[operation.model, operation.name], [*map(name_of, operation.nodes)]
        if operation.is_gone:
            held.difference_update(hashes)
            index.remove(operation.model, operation.name, hashes)
        else:
            held.update(hashes)
            index.add(operation.model, operation.name, hashes, None)

    def last(self, model: str, names: Collection[str], hashes: Sequence[int]) -> dict[str, int]:
        """Position of the last of `hashes` that is held, per name that holds any."""
        places = {}
        for name in names:
            held = self.held.get((model, name), set())
            found = [position for position, block in enumerate(hashes) if block in held]
            if found:
                places[name] = found[-1]
        return places

    def count(self, model: str, chain: Sequence[int]) -> dict[str, int]:
        """Consecutive blocks from the start, per pod that holds any."""
        counts = {}
        for pod in PODS:
            held = self.held[model, pod]
            count = next((i for i, block in enumerate(chain) if block not in held), len(chain))
            if count:
                counts[pod] = count
        return counts


class CountingChain(Sequence[int]):
    """A long chain that knows how far it has been read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read = 0

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        positions = range(self.length)[index]
        if isinstance(positions, int):
            self.read = max(self.read, positions + 1)
            return name_of(positions)
        self.read = max(self.read, *(position + 1 for position in positions), 0)
        return [name_of(position) for position in positions]


@st.composite
def trees(draw: st.DrawFn, blocks: int = 12) -> Tree:
    """Trees with a few roots, of up to `blocks` blocks."""
    size = draw(st.integers(1, blocks))
    # Mostly the block before, so that chains grow long.
    return Tree(
        tuple(
            None if n == 0 else draw(st.one_of(st.just(n - 1), st.none(), st.integers(0, n - 1))) for n in range(size)
        )
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[Tree, list[Operation]]:
    """A tree of blocks and what pods do with it."""
    tree = draw(trees())
    models, pods, nodes = st.sampled_from(MODELS), st.sampled_from(PODS), st.integers(0, len(tree.parents) - 1)
    adds = st.builds(Add, models, pods, nodes, st.integers(0, 12))
    removes = st.builds(Remove, models, pods, nodes)
    marked = st.lists(nodes, max_size=4).map(tuple)
    marks = st.builds(Mark, models, st.sampled_from(ENDS), marked, st.sampled_from((False, False, True)))
    clears = st.builds(Clear, st.sampled_from((*PODS, *ENDS)), st.booleans())
    return tree, draw(st.lists(st.one_of(adds, adds, adds, removes, removes, marks, marks, clears), max_size=40))
