"""Checks from an engine's events whether the engine tokenizes a prompt as the gateway does.

An engine that holds the first `held` tokens of a prompt computes the rest, and stores it as blocks that follow the block
which ends there. So while the prompt is in flight, a new chain of blocks after exactly those tokens belongs to that
prompt, if there is only one such chain. Its tokens are then the engine's own token ids of the prompt. No chain (the
engine held more than was known) or several (other prompts continue from the same place) prove nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from matrixinfer.blocks import TokenIds, token_bytes
from matrixinfer.kvevents.run import Run


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
        self._model = model
        self._tokens = token_bytes(ids)
        self._held = held
        blocks = held // block_size
        self._parent = chain[blocks - 1] if blocks else None

    def see(self, run: Run, position: int) -> None:
        """Look at the blocks that were appended to `run` from `position` on."""
        if run.start + position * run.block_size != self._held or run.model != self._model:
            return
        parent, rest = run.before(position)
        start = 4 * self._held
        if parent != self._parent or rest != self._tokens[start - len(rest) : start]:
            return
        self.chains += 1
        self.first_difference = self._difference(bytes(run.tokens[start - 4 * run.base :]))

    def is_like(self, other: Witness) -> bool:
        """Whether this witness could mistake blocks that `other` looks for for its own."""
        return (self._model, self._held, self._parent) == (other._model, other._held, other._parent)

    def _difference(self, theirs: bytes) -> int | None:
        ours = self._tokens[4 * self._held :]
        count = min(len(ours), len(theirs))
        if ours[:count] == theirs[:count]:
            return None
        at = next(i for i in range(0, count, 4) if ours[i : i + 4] != theirs[i : i + 4])
        return self._held + at // 4
