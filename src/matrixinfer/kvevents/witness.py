"""Checks from an engine's events whether the engine tokenizes a prompt as the gateway does.

An engine that holds the first `held` tokens of a prompt computes the rest, and stores it as blocks that follow the block
which ends there. So while the prompt is in flight, a new chain of blocks after exactly those tokens belongs to that
prompt, or to another one that continues from the same place. Whoever knows those others can tell (`trust.sampling`). No
chain proves nothing: the engine held more than was known.
"""

from __future__ import annotations

from collections.abc import Sequence

from matrixinfer.blocks import TokenIds, token_bytes
from matrixinfer.kvevents.run import Run

_MAX_SEEN = 64
_MAX_BYTES = 4 * 2048


class Witness:
    """Looks for blocks of the prompt `ids`, shape (n,), that follow its first `held` tokens.

    `chain` holds the prompt's hashes for blocks of `block_size` tokens; `model` is the index's name of the model. The
    prompt has neither salt nor media.
    """

    def __init__(
        self, model: str, ids: TokenIds | Sequence[int], chain: Sequence[int], *, held: int, block_size: int
    ) -> None:
        self.chains = 0
        """How many new chains followed those tokens."""
        self.first_difference: int | None = None
        """Position in the prompt of the first token that differs in the last chain seen; None if all are equal."""
        self.equal: bytes | None = None
        """The tokens, four bytes each, of the first chain that equals the prompt as far as it was stored at once."""
        self.strange: list[bytes] = []
        """The tokens of the first chains that do not, or the beginnings of these."""
        self.model = model
        self.held = held
        self.ids = ids
        self._tokens = token_bytes(ids)
        blocks = held // block_size
        self._parent = chain[blocks - 1] if blocks else None

    def see(self, run: Run, position: int) -> None:
        """Look at the blocks that were appended to `run` from `position` on."""
        if run.start + position * run.block_size != self.held or run.model != self.model:
            return
        parent, rest = run.before(position)
        start = 4 * self.held
        if parent != self._parent or rest != self._tokens[start - len(rest) : start]:
            return
        theirs = run.tokens.part(self.held - run.base, run.tokens.count)
        self.chains += 1
        self.first_difference = self.difference(theirs)
        if self.first_difference is None:
            self.equal = self.equal or theirs
        elif len(self.strange) < _MAX_SEEN:
            self.strange.append(theirs[:_MAX_BYTES])

    def difference(self, theirs: bytes) -> int | None:
        """The position in the prompt of the first token that differs in a chain; None if all are equal."""
        ours = self._tokens[4 * self.held :]
        count = min(len(ours), len(theirs))
        if ours[:count] == theirs[:count]:
            return None
        at = next(i for i in range(0, count, 4) if ours[i : i + 4] != theirs[i : i + 4])
        return self.held + at // 4

    def is_of(self, theirs: bytes, ids: TokenIds) -> bool:
        """Whether a chain may hold the tokens of another prompt, `ids`, that begins with the same `held` tokens."""
        return token_bytes(ids[self.held : self.held + len(theirs) // 4]) == theirs[: 4 * max(0, len(ids) - self.held)]
