"""Counts how many engine blocks support each token block of one endpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

from matrixinfer.index.base import BlockIndex
from matrixinfer.index.room import is_roomy
from matrixinfer.traffic.history import RoutingHistory

_COPIED = 50_000
"""The most token blocks of a model whose dict is copied to save memory: that holds the loop for a millisecond."""


class Watch:
    """Records how many of a run of token blocks have kept their support ever since the watch began.

    Blocks that come back do not count: whoever looks them up may have stored them itself.
    """

    __slots__ = ("left", "model", "names")

    def __init__(self, model: str, names: Sequence[int]) -> None:
        self.model = model
        self.names = names
        self.left = len(names)


class Supports:
    """Counts supports, and adds token blocks to the index with their first support, and removes them with their last.

    Removals reach the index with `flush`, many in one call.
    """

    def __init__(self, pod: str, index: BlockIndex, history: RoutingHistory | None = None) -> None:
        """`history` learns which blocks are gone, so that it no longer counts them as sent."""
        self._pod = pod
        self._index = index
        self._history = history
        self._counts: dict[str, dict[int, int]] = {}  # by model
        self._gone: dict[str, list[int]] = {}
        self._watches: dict[tuple[str, int], list[Watch]] = {}  # by model and last block that is left

    def __len__(self) -> int:
        return sum(map(len, self._counts.values()))

    @property
    def models(self) -> Collection[str]:
        """The models with token blocks that are supported."""
        return self._counts.keys()

    @property
    def watched(self) -> int:
        """How many token blocks are being watched."""
        return len(self._watches)

    def held(self, model: str, names: Iterable[int]) -> int:
        """How many of `names`, from the first on, are supported without a break."""
        counts = self._counts.get(model, {})
        return sum(1 for _ in takewhile(counts.__contains__, names))

    def add(self, model: str, names: Sequence[int], parent: int | None) -> None:
        """Add one supporter to each block in `names`, consecutive blocks that follow the token block `parent`."""
        if not names:
            return
        counts = self._counts.setdefault(model, {})
        if counts.keys().isdisjoint(names) and len(set(names)) == len(names):
            counts.update(dict.fromkeys(names, 1))
        else:
            for name in names:
                counts[name] = counts.get(name, 0) + 1
        self._index.add(model, self._pod, names, parent)

    def remove(self, model: str, names: Iterable[int]) -> None:
        """Drop one supporter of each block in `names`. Raises `KeyError` for a block without supporters."""
        counts, touched = self._counts.get(model, {}), list[int]()
        for name in names:
            left = counts[name] - 1
            if left:
                counts[name] = left
            else:
                del counts[name]
                self._gone.setdefault(model, []).append(name)
                if self._watches and (model, name) in self._watches:
                    touched.append(name)
        for name in touched:
            for watch in self._watches.pop((model, name), ()):
                self._shorten(watch, counts)
        if not counts:
            self._counts.pop(model, None)  # adapters come and go
        elif len(counts) <= _COPIED and is_roomy(counts):
            self._counts[model] = dict(counts)

    def flush(self) -> None:
        """Remove from the index what has lost its last support."""
        for model, names in self._gone.items():
            self._index.remove(model, self._pod, names)
            if self._history is not None:
                self._history.drop(self._pod, model, names)
        self._gone.clear()

    def clear(self) -> None:
        """Drop every support."""
        self._counts.clear()
        self._gone.clear()
        for watches in self._watches.values():
            for watch in watches:
                watch.left = 0
        self._watches.clear()
        self._index.clear(self._pod)

    def forget(self) -> None:
        """Have the index forget the endpoint, once its supports are cleared."""
        self._index.forget(self._pod)

    def watch(self, model: str, names: Sequence[int]) -> Watch:
        """Begin to watch a run of token blocks. Those that have lost their support already do not count. End with `unwatch`.

        No block of a run is supported without those before it, so it is enough to look at the last one that is left.
        """
        watch, counts = Watch(model, names), self._counts.get(model, {})
        while watch.left and names[watch.left - 1] not in counts:
            watch.left -= 1
        if watch.left:
            self._watches.setdefault((model, names[-1]), []).append(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """End a watch."""
        if not watch.left:
            return
        last = watch.model, watch.names[watch.left - 1]
        watches = self._watches.get(last, [])
        if watch in watches:
            watches.remove(watch)
            if not watches:
                del self._watches[last]

    def _shorten(self, watch: Watch, counts: Collection[int]) -> None:
        """The last block that a watch looks at is gone: go back to the last one that is still there."""
        while watch.left and watch.names[watch.left - 1] not in counts:
            watch.left -= 1
        if watch.left:
            self._watches.setdefault((watch.model, watch.names[watch.left - 1]), []).append(watch)
