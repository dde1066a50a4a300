"""Learns what an engine makes of images, audio and video: its name of each, and the tokens that stand for it.

A request with media that were not seen before is watched until shortly after its answer. The chains that its endpoint
stored meanwhile, and that the request's outline explains to the token, show both. What is learnt must be certain:

- the answer says that the media were computed, so that the chain of this request is among those stored;
- the answer counts as many tokens as the explanation has;
- all such chains name the same media;
- so do all chains that end where this prompt's last whole block does, of which one is its own. It may be too short to be
  explained, while that of another image under the same text goes on.

Two requests at a time that differ in their images alone therefore teach nothing. Nor is anything believed of content for
which engines have shown two names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from matrixinfer.blocks import Medium, TokenIds, salt_parent
from matrixinfer.kvevents.ledger import Ledger
from matrixinfer.kvevents.media_chain import MediaChain
from matrixinfer.prompt.cache import Lru
from matrixinfer.prompt.outline import Outline, expand

_MAX_BYTES = 32 * 1024 * 1024
_ENTRY_BYTES = 300
_SETTLE_SECONDS = 2.0
"""Events of a request may come this long after its answer."""
_MOST_WATCHED = 64
"""Requests that are watched at one endpoint."""
_MOST_SHOWN = 256
"""Chains that begin like a request that is watched. Beyond them, it teaches nothing."""
_MOST_ENDS = 64
"""Places where a medium may end that are looked at."""
_SURE = 8
"""So many tokens after the last medium must be as the outline says, or all of them if there are fewer."""


class Named(NamedTuple):
    """What an engine makes of one medium."""

    name: str
    run: tuple[int, ...]
    """The tokens that stand for it."""


@dataclass(slots=True, eq=False)
class Watched:
    """A request with media that are not all known."""

    model: str
    seed: int | None
    outline: Outline
    explanations: set[tuple[Named, ...]] = field(default_factory=set)
    starts: tuple[int, ...] = ()
    """Where the media of the last explanation begin."""
    shown: set[tuple[int, tuple[str, ...]]] = field(default_factory=set)
    """The chains that begin like the prompt: how many tokens they have, and the names of their media."""
    block_size: int = 0
    counted: tuple[int, int] | None = None
    """The prompt's tokens, and those that were found in the cache, as the answer reports them."""
    done: float | None = None

    @property
    def is_vain(self) -> bool:
        """Whether nothing can be learnt from it any more."""
        return len(self.explanations) > 1 or len(self.shown) > _MOST_SHOWN

    def reported(self, tokens: int, cached: int | None) -> None:
        """The answer reports the prompt's tokens, and those found in the cache."""
        if cached is not None:
            self.counted = tokens, cached


class MediaNames:
    """What engines have shown of media, by model and content."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._named: Lru[tuple[str, bytes], Named | None] = Lru(_MAX_BYTES)  # None: two names for one content
        self._watched: dict[str, list[Watched]] = {}

    def __len__(self) -> int:
        """Contents that something is known of."""
        return len(self._named)

    def expand(self, model: str, outline: Outline) -> tuple[TokenIds, list[Medium]] | None:
        """The whole prompt's ids, shape (n,), and its media; None unless all of them are known."""
        for endpoint in list(self._watched):
            self._settle(endpoint)
        named = [self._named.get((model, content)) for content in outline.contents]
        known = [each for each in named if each is not None]
        if len(known) < len(named):
            return None
        placeholders = _placeholders(outline, known[0].run[0])
        if placeholders is None:
            return None
        media, shift = [], 0
        for position, each in zip(placeholders, known, strict=True):
            media.append((position + shift, each.name))
            shift += len(each.run) - 1
        ids = expand(outline.ids, placeholders, [each.run for each in known])
        return np.array(ids, dtype=np.uint32), media

    def watch(self, endpoint: str, ledger: Ledger, model: str, salt: str | None, outline: Outline) -> Watched | None:
        """Begin to watch a request that goes to an endpoint. End with `close`. None where too many are watched."""
        self._settle(endpoint)
        watched = self._watched.setdefault(endpoint, [])
        if len(watched) >= _MOST_WATCHED:
            return None
        request = Watched(model, None if salt is None else salt_parent(salt), outline)
        watched.append(request)
        ledger.see_media(lambda chain: self.see(endpoint, chain))
        return request

    def see(self, endpoint: str, chain: MediaChain) -> None:
        """An endpoint has stored blocks of a chain with media."""
        tokens = np.frombuffer(chain.tokens, dtype=">u4")
        for request in self._watched.get(endpoint, ()):
            if request.model != chain.model or request.seed != chain.seed or request.is_vain:
                continue
            if not _begins(request.outline, tokens, chain.media):
                continue
            request.shown.add((len(tokens), tuple(name for _, name in chain.media)))
            request.block_size = chain.block_size
            explained = explain(request.outline, tokens, chain.media)
            if explained is not None:
                request.explanations.add(explained)
                request.starts = tuple(start for start, _ in chain.media)

    def close(self, request: Watched) -> None:
        """A request that is watched is over. What it teaches is learnt once its events must have come."""
        request.done = self._clock()

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone."""
        self._watched.pop(endpoint, None)

    def _settle(self, endpoint: str) -> None:
        """Learn from requests that have been over for long enough."""
        watched, now = self._watched.get(endpoint, []), self._clock()
        over = [each for each in watched if each.done is not None and each.done + _SETTLE_SECONDS <= now]
        for request in over:
            watched.remove(request)
            self._learn(request)
        if not watched:
            self._watched.pop(endpoint, None)

    def _learn(self, request: Watched) -> None:
        if request.counted is None or request.is_vain or not request.explanations:
            return
        (named,) = request.explanations
        tokens, cached = request.counted
        if tokens != len(request.outline.ids) + sum(len(each.run) - 1 for each in named):
            return
        whole = tokens // request.block_size * request.block_size
        if {names for length, names in request.shown if length == whole} != {tuple(each.name for each in named)}:
            return
        for content, start, each in zip(request.outline.contents, request.starts, named, strict=True):
            key = request.model, content
            known = self._named.peek(key)
            if key in self._named and known != each:
                self._named.put(key, None, _ENTRY_BYTES)
            elif cached <= start:  # or it was found, and what was stored need not be this one
                self._named.put(key, each, _ENTRY_BYTES + 40 * len(each.run))


def _begins(outline: Outline, tokens: TokenIds, media: Sequence[Medium]) -> bool:
    """Whether a chain has as many media as an outline, and the same tokens before them."""
    first = media[0][0]
    return len(media) == len(outline.contents) and bool(np.array_equal(outline.ids[:first], tokens[:first]))


def explain(outline: Outline, tokens: TokenIds, media: Sequence[Medium]) -> tuple[Named, ...] | None:
    """What the media of an outline are, if a chain of `tokens`, in which `media` begin, is that of its prompt."""
    ids, first = outline.ids, media[0][0]
    if len(media) != len(outline.contents) or first >= len(ids) or first >= len(tokens):
        return None
    placeholders = _placeholders(outline, int(ids[first]))
    if placeholders is None or placeholders[0] != first or not np.array_equal(ids[:first], tokens[:first]):
        return None
    named: list[Named] = []
    for number, (start, name) in enumerate(media):
        position = placeholders[number]
        if number + 1 < len(media):
            after = ids[position + 1 : placeholders[number + 1]]
            end = media[number + 1][0] - len(after)
            if end <= start or not np.array_equal(tokens[end : end + len(after)], after):
                return None
        else:
            found = _end(tokens, start, ids[position + 1 :])
            if found is None:
                return None
            end = found
        run = tuple(tokens[start:end].tolist())
        if run[0] != ids[position]:
            return None  # the placeholder is not where an outline would show it again
        named.append(Named(name, run))
    return tuple(named)


def _end(tokens: TokenIds, start: int, rest: TokenIds) -> int | None:
    """Where a medium that begins at `start` ends, so that the `rest` of an outline follows; None unless that is certain."""
    if not len(rest):
        return None
    sure = min(_SURE, len(rest))
    after, last = tokens[start + 1 :], len(tokens) - start - 1 - sure
    if last < 0:
        return None
    fits = np.ones(last + 1, dtype=bool)
    for offset, token in enumerate(rest[:sure].tolist()):
        fits &= after[offset : offset + last + 1] == token
    ends = (start + 1 + np.flatnonzero(fits)).tolist()
    if len(ends) > _MOST_ENDS:
        return None  # a text that repeats itself
    found = [end for end in ends if np.array_equal(tokens[end : end + len(rest)], rest[: len(tokens) - end])]
    return found[0] if len(found) == 1 else None


def _placeholders(outline: Outline, token: int) -> list[int] | None:
    """Where the placeholders of an outline are; None if the token stands elsewhere, too."""
    found: list[int] = np.flatnonzero(outline.ids == token).tolist()
    return found if len(found) == len(outline.contents) else None
