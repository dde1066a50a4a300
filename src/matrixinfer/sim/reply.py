"""Replies made of common words, chosen by a hash of the prompt.

The next turn of a chat contains the reply as text. It must have the same tokens that the engine generated, or the cached
prefix would end there. So replies consist of words that are one token each.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from hashlib import sha256

from matrixinfer.blocks import TokenIds
from matrixinfer.prompt.local import LocalTokenizer

_WORDS = """
about above after again against almost along also always among another answer around because become before
behind below between both build call change city clear close come could country course day different down during
early earth end enough even every example face family far field find first follow form found four from full game
give good great group hand hard have head help here high home house idea important into just keep kind know land
large last late learn leave left letter life light line list little live long look made make many mean might mind
more most mother move much must name near need never next night north number often old once only open order other
own page paper part people place plan plant point power problem question read right river room same school second
see sentence set should show side simple small some sound south start state still stop story study such sun
system table take tell than that their them then there these they thing think this those thought three through
time together took tree turn under until use very walk want watch water way well went were what when where which
while white who why will with without wood word work world would write year young""".split()  # noqa: SIM905 - a list of two hundred strings is hard to read
_ENOUGH_WORDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Token ids, and the text of each."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole reply."""
        return "".join(self.pieces)


class ReplyWriter:
    """Writes replies in the tokens of a tokenizer."""

    def __init__(self, tokenizer: LocalTokenizer, seed: int) -> None:
        self._seed = seed
        self._first = _vocabulary(tokenizer, [word.capitalize() for word in _WORDS])
        self._rest = _vocabulary(tokenizer, [f" {word}" for word in _WORDS])

    def write(self, prompt: TokenIds, length: int, choice: int = 0) -> Reply:
        """The reply of `length` tokens to a prompt. It depends only on prompt, seed and choice."""
        digest = sha256(prompt.astype("<u4", copy=False).tobytes()).digest()
        seed = digest + self._seed.to_bytes(8, "little", signed=True)
        rng = random.Random(seed + choice.to_bytes(4, "little") if choice else seed)
        tokens = list(rng.choice(self._first))
        for word in rng.choices(self._rest, k=length):
            tokens += word
            if len(tokens) >= length:
                break
        ids, pieces = zip(*tokens[:length], strict=True)
        return Reply(ids=ids, pieces=pieces)


def _vocabulary(tokenizer: LocalTokenizer, words: list[str]) -> list[list[tuple[int, str]]]:
    """The tokens of each word, as `(id, text)`. If enough words have a single token, only those."""
    spelled = []
    for word in words:
        ids = tokenizer.encode(word, add_special_tokens=False)
        pieces = [tokenizer.decode(ids[i : i + 1]).decode(errors="replace") for i in range(len(ids))]
        spelled.append(list(zip(ids.tolist(), pieces, strict=True)))
    short = [tokens for tokens in spelled if len(tokens) == 1 and tokens[0][1]]
    return short if len(short) >= _ENOUGH_WORDS else spelled
