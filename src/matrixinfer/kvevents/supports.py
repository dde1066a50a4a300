"""How many engine blocks support each token block of one publisher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matrixinfer.index.base import BlockIndex


class Supports:
    """Counts supports, and tells the index of token blocks that gain their first or lose their last.

    Removals reach the index with `flush`, so that many of them are one call.
    """

    def __init__(self, pod: str, index: BlockIndex) -> None:
        self._pod = pod
        self._index = index
        self._counts: dict[str, dict[int, int]] = {}  # by model
        self._gone: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._counts.values()))

    def add(self, model: str, names: Sequence[int], parent: int | None) -> None:
        """One more engine block, or several in a row, supports `names`, which follow the token block `parent`."""
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
        """One less supports `names`. Raises `KeyError` for what nothing supports."""
        counts = self._counts.get(model, {})
        for name in names:
            left = counts[name] - 1
            if left:
                counts[name] = left
            else:
                del counts[name]
                self._gone.setdefault(model, []).append(name)
        if not counts:
            self._counts.pop(model, None)  # adapters come and go

    def flush(self) -> None:
        """Tell the index what is gone."""
        for model, names in self._gone.items():
            self._index.remove(model, self._pod, names)
        self._gone.clear()

    def clear(self) -> None:
        """Nothing is supported any more."""
        self._counts.clear()
        self._gone.clear()
        self._index.clear(self._pod)
