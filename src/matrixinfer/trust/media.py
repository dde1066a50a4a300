"""Learns what an engine makes of images, audio and video: its name of each, and the tokens that stand for it.

A request with media that were not seen before is watched until shortly after its answer. Of the chains that its endpoint
stored meanwhile, some may be its own: those that begin as its outline does and are as long as what it must have stored.
With the number of tokens that the answer reports, they show both. What is learnt must be certain:

- the request has stored a block of its own after its media, and no event was lost, so one of the chains is its own;
- all chains that may be its own name the same media.

Two requests at a time that differ in their images alone therefore teach nothing. Nor is anything believed of content for
which engines have shown two names.
"""

from __future__ import annotations

from collections.abc import Callable
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
_MOST_SEEN = 64
"""Chains that are kept for one request: each new one is compared with all of them."""
_MOST_SEEN_BYTES = 2 * 1024 * 1024
"""Chains that are kept for one request; with more it teaches nothing."""
_SURE = 8
"""So many tokens after the last medium must be as the outline says, or all of them if there are fewer."""


class Named(NamedTuple):
    """What an engine makes of one medium."""

    name: str
    run: tuple[int, ...]
    """The tokens that stand for it; empty if a chain does not show where it ends."""


@dataclass(slots=True, eq=False)
class Watched:
    """A request with media that are not all known."""

    model: str
    seed: int | None
    outline: Outline
    ledger: Ledger
    is_whole: Callable[[], bool]
    """Whether all events since it was sent have been read."""
    seen: list[MediaChain] = field(default_factory=list)
    """Chains that begin as the outline does. None of them is the beginning of another."""
    is_lost: bool = False
    """There were more chains than are kept."""
    counted: tuple[int, int] | None = None
    """The prompt's tokens, and those that were found in the cache, as the answer reports them."""
    done: float | None = None

    def reported(self, tokens: int, cached: int | None) -> None:
        """The answer reports the prompt's tokens, and those found in the cache."""
        if cached is not None:
            self.counted = tokens, cached

    def see(self, chain: MediaChain) -> None:
        """The endpoint has stored blocks of a chain with media."""
        if self.is_lost or chain.model != self.model or chain.seed != self.seed:
            return
        if not begins(self.outline, chain):
            return
        self.seen = [each for each in self.seen if not _goes_on(chain, each)] + [chain]
        if len(self.seen) > _MOST_SEEN or sum(len(each.tokens) for each in self.seen) > _MOST_SEEN_BYTES:
            self.seen, self.is_lost = [], True

    def shown(self) -> list[Named]:
        """What is certain of the media, the first ones, with empty runs where only the name is; empty for nothing."""
        if self.counted is None or self.is_lost or not self.is_whole():
            return []
        tokens, cached = self.counted
        stored = self.ledger.stored_of(tokens)
        if stored <= cached:
            return []  # found in the cache: what was stored meanwhile need not be this one
        shown: list[Named] = []
        for chain in self.seen:
            # The request's own chain is sure to begin so, but what follows there may be another's.
            own = explain(self.outline, _beginning(chain, stored), tokens) if len(chain.tokens) >= stored * 4 else ()
            further = explain(self.outline, chain, tokens)
            for number, each in enumerate(further[: len(own)] or own):
                if number == len(shown):
                    shown.append(each)
                elif shown[number].name != each.name or (shown[number].run and each.run not in (shown[number].run, ())):
                    return []
                elif each.run:
                    shown[number] = each
        return shown


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

    def watch(
        self,
        endpoint: str,
        ledger: Ledger,
        model: str,
        salt: str | None,
        outline: Outline,
        is_whole: Callable[[], bool],
    ) -> Watched | None:
        """Begin to watch a request that goes to an endpoint. End with `close`. None where too many are watched."""
        self._settle(endpoint)
        watched = self._watched.setdefault(endpoint, [])
        if len(watched) >= _MOST_WATCHED:
            return None
        request = Watched(model, None if salt is None else salt_parent(salt), outline, ledger, is_whole)
        watched.append(request)
        ledger.see_media(lambda chain: self._see(endpoint, chain))
        return request

    def close(self, request: Watched) -> None:
        """A request that is watched is over. What it teaches is learnt once its events must have come."""
        request.done = self._clock()

    def forget(self, endpoint: str) -> None:
        """An endpoint has gone."""
        for request in self._watched.pop(endpoint, ()):
            request.ledger.see_media(None)

    def _see(self, endpoint: str, chain: MediaChain) -> None:
        for request in self._watched.get(endpoint, ()):
            request.see(chain)

    def _settle(self, endpoint: str) -> None:
        """Learn from requests that have been over for long enough."""
        watched, now = self._watched.get(endpoint, []), self._clock()
        over = [each for each in watched if each.done is not None and each.done + _SETTLE_SECONDS <= now]
        for request in over:
            watched.remove(request)
            for number, each in enumerate(request.shown()):
                if each.run:
                    self._learn(request.model, request.outline, number, each)
        if over and not watched:
            del self._watched[endpoint]
            over[-1].ledger.see_media(None)

    def _learn(self, model: str, outline: Outline, number: int, shown: Named) -> None:
        for content in outline.names_of(number):
            key = model, content
            known = self._named.peek(key)
            if key in self._named and known != shown:
                self._named.put(key, None, _ENTRY_BYTES)
            else:
                self._named.put(key, shown, _ENTRY_BYTES + 40 * len(shown.run))


def begins(outline: Outline, chain: MediaChain) -> bool:
    """Whether a chain may be that of an outline's prompt, as far as its first medium."""
    ids, first = outline.ids, chain.media[0][0]
    if len(chain.media) > len(outline.contents) or first >= min(len(ids), len(chain.tokens) // 4):
        return False
    placeholders = _placeholders(outline, int(ids[first]))
    if placeholders is None or placeholders[0] != first:
        return False
    return np.array_equal(ids[:first], _ids(chain)[:first])


def explain(outline: Outline, chain: MediaChain, count: int) -> tuple[Named, ...]:
    """What the first media of an outline's prompt of `count` tokens are, if a chain that `begins` like it may be its own.

    Empty if it is that of another prompt.
    """
    ids, tokens, media = outline.ids, _ids(chain), chain.media
    placeholders = _placeholders(outline, int(ids[media[0][0]])) if media else None
    if placeholders is None:
        return ()
    named: list[Named] = []
    for number, (start, name) in enumerate(media):
        position = placeholders[number]
        if number + 1 < len(placeholders):
            after, follows = ids[position + 1 : placeholders[number + 1]], number + 1 < len(media)
            end = media[number + 1][0] - len(after) if follows else None
        else:
            after = ids[position + 1 :]
            end = count - len(after)
        if end is not None and (end <= start or not _agree(tokens[end : end + len(after)], after)):
            return ()
        is_shown = end is not None and len(tokens) >= end + min(_SURE, len(after)) and tokens[start] == ids[position]
        named.append(Named(name, tuple(tokens[start:end].tolist()) if is_shown else ()))
    return tuple(named)


def _beginning(chain: MediaChain, tokens: int) -> MediaChain:
    """The first tokens of a chain."""
    media = [medium for medium in chain.media if medium[0] < tokens]
    return chain._replace(tokens=chain.tokens[: tokens * 4], media=media)


def _agree(shown: TokenIds, expected: TokenIds) -> bool:
    """Whether what a chain shows is as expected; it may end early."""
    return np.array_equal(shown, expected[: len(shown)])


def _ids(chain: MediaChain) -> TokenIds:
    return np.frombuffer(chain.tokens, dtype=">u4")


def _goes_on(chain: MediaChain, before: MediaChain) -> bool:
    """Whether a chain begins with another one."""
    return chain.tokens.startswith(before.tokens) and chain.media[: len(before.media)] == before.media


def _placeholders(outline: Outline, token: int) -> list[int] | None:
    """Where the placeholders of an outline are; None if the token stands elsewhere, too."""
    found: list[int] = np.flatnonzero(outline.ids == token).tolist()
    return found if len(found) == len(outline.contents) else None
