"""What a replay replays: prompts in blocks of content, how they depend on each other, and when they are sent.

A prompt is a sequence of letters. A letter stands for a block of `block_size` tokens with its own content; equal letters
after equal beginnings are equal blocks. Engines and gateways then work on letters instead of tokens, and count tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from matrixinfer.blocks import TokenBlockProcessor

_LETTERS = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request."""

    session: str
    delay: float
    """Seconds between the end of the turn `after` and this request; from the start of the trace if there is none."""
    after: int | None = None
    """Position of the turn whose answer must be complete first."""
    not_before: float = 0.0
    """Seconds from the start of the trace before which it is not sent."""
    prompt: int
    """Tokens."""
    reply: int
    """Tokens that the engine generates, at least one."""
    letters: Sequence[int]
    """Of the blocks that prompt and reply fill; those after the prompt's are the reply's content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Turns, each after the one that it depends on."""

    name: str
    block_size: int
    turns: Sequence[Turn]
    settings: Mapping[str, object] = field(default_factory=dict)
    """What its reader was told, for the report."""

    def first(self, turns: int, *, most_tokens: int) -> Trace:
        """The first `turns` requests of at most `most_tokens` tokens with their replies.

        What depends on a longer one depends on the one before that instead.
        """
        kept: list[Turn] = []
        place: dict[int | None, int | None] = {None: None}
        for number, turn in enumerate(self.turns):
            if len(kept) == turns:
                break
            if turn.prompt + turn.reply > most_tokens:
                place[number] = place[turn.after]
                continue
            place[number] = len(kept)
            kept.append(replace(turn, after=place[turn.after]))
        return Trace(name=self.name, block_size=self.block_size, turns=kept, settings=self.settings)

    def ideal_hit_rate(self, blocks: LetterBlocks) -> float:
        """Share of the prompt tokens that one cache without bounds would have, if the turns came in this order."""
        seen: set[int] = set()
        hits = tokens = 0
        for number, turn in enumerate(self.turns):
            hashes = blocks.of_turn(number, turn)
            full = (turn.prompt - 1) // self.block_size
            matched = next((at for at, key in enumerate(hashes[:full]) if key not in seen), min(full, len(hashes)))
            hits += matched * self.block_size
            tokens += turn.prompt
            seen.update(hashes)
        return hits / tokens if tokens else 0.0


class LetterBlocks(TokenBlockProcessor):
    """Hashes blocks of one letter each as the gateway hashes blocks of tokens, and remembers what it has hashed.

    One instance serves all replays of one trace.
    """

    __slots__ = ("_known", "_turns")

    def __init__(self) -> None:
        super().__init__(1)
        self._known: dict[tuple[int | None, int], int] = {}
        self._turns: dict[int, tuple[Sequence[int], list[int]]] = {}

    def of_turn(self, number: int, turn: Turn) -> list[int]:
        """The hashes of the blocks of the trace's turn `number`."""
        known = self._turns.get(number)
        if known is None:
            letters, hashes = self._turns.get(-1 if turn.after is None else turn.after, ((), []))
            begun = hashes[: _common(letters, turn.letters)]
            rest = self.of(turn.letters[len(begun) :], begun[-1] if begun else None)
            known = self._turns[number] = turn.letters, begun + rest
        return known[1]

    def of(self, letters: Sequence[int], parent: int | None = None) -> list[int]:
        """The hash of each letter after those before it."""
        known, out = self._known, list[int]()
        for at, letter in enumerate(letters):
            found = known.get((parent, letter))
            if found is None:
                return out + self._new(letters[at:], parent)
            out.append(found)
            parent = found
        return out

    def _new(self, letters: Sequence[int], parent: int | None) -> list[int]:
        """The hashes of letters after a parent that the first has not followed before, so that none is known."""
        data = array("I", letters)
        data.byteswap()
        hashes = super().hashes(data.tobytes(), parent)
        self._known.update(zip(zip((parent, *hashes), letters, strict=False), hashes, strict=True))
        return hashes

    def hashes(
        self,
        data: bytes | bytearray | memoryview[int],
        parent: int | None = None,
        media: Sequence[tuple[int, str]] = (),
    ) -> list[int]:
        """The hashes of the letters in `data`, four bytes each."""
        letters = array("I", bytes(data))
        letters.byteswap()
        return self.of(letters, parent)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first letters are equal."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


class Alphabet:
    """Gives letters: the same one for the same content, and new ones for content that never comes again."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}
        self._next = 0

    def letter(self, content: object) -> int:
        """The letter of `content`."""
        letter = self._known.get(content)
        if letter is None:
            letter = self._known[content] = self._next
            self._next += 1
        return letter

    def word(self, contents: Iterable[object]) -> array[int]:
        """The letters of several blocks."""
        return array("I", map(self.letter, contents))

    def new(self, count: int) -> array[int]:
        """Letters that nothing else has."""
        first = self.reserve(count)
        return array("I", range(first, first + count))

    def reserve(self, count: int) -> int:
        """The first of `count` letters that nothing else has. Raises `OverflowError` when there are not so many."""
        first, self._next = self._next, self._next + count
        if self._next > _LETTERS:
            raise OverflowError("too many different blocks")
        return first


def filled(letters: Sequence[int], prompt: int, reply: int, block_size: int, alphabet: Alphabet) -> array[int]:
    """The letters of prompt and reply: those that are known, as far as both fill blocks, and new ones for the rest."""
    blocks = (prompt + reply) // block_size
    word = array("I", letters[:blocks])
    return word + alphabet.new(blocks - len(word))
