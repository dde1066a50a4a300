"""What the events of one engine cannot tell, in plain words that name the remedy. Pure.

A limit is noted when the events show it. Those about the engine's layout last until another engine is expected; those
about the blocks at hand last until every block is gone.
"""

from __future__ import annotations

_MOST = 16

CHUNKED = (
    "chunked attention: its chunk size is not published, so hits may be longer than predicted; "
    "for exact hits start vLLM with --disable-hybrid-kv-cache-manager"
)
CHUNKED_ALONE = (
    "no full attention but chunked attention: every whole chunk counts as cached, so hits may be longer than predicted; "
    "start vLLM with --disable-hybrid-kv-cache-manager"
)
SPARSE_WINDOWS = (
    "no full attention, and blocks are published sparsely (prefix_cache_retention_interval 0), so hits may be longer "
    "than predicted; set prefix_cache_retention_interval to null"
)
DROPPED_SIZES = (
    "speculative decoding drops blocks, and sliding windows have smaller blocks than full attention, so hits may be longer "
    "or shorter than predicted; use vLLM 0.33 or later, whose blocks depend on the tokens after them instead"
)
FINE_STATES = (
    "prefix_match_unit below the block size hides the last tokens of a hit, so hits may be longer than predicted; "
    "leave prefix_match_unit at the block size"
)
UNLINKED = (
    "an attention group names blocks that the group of full attention does not have, so hits may be longer than "
    "predicted; restart the engine, or report its version"
)
SHARED_PAGES = (
    "pages of several salts or adapters share a hash, and a removal does not say whose page went, so hits may be "
    "shorter than predicted; give each tenant a replica of its own, or accept the difference"
)
SLOWER_TIERS = (
    "slower tiers are not counted for engines with several attention groups or with speculative decoding, so hits may "
    "be longer than predicted; expect less of the slower tiers, or turn them off"
)
ORPHANS = (
    "blocks were stored after parents that were never seen, so hits may be longer than predicted; "
    "enable the engine's replay endpoint, or reset its cache"
)
MISFITS = "events whose tokens do not fit their blocks were left out, so hits may be longer than predicted; report them"
UNKNOWN_KIND = "an attention kind that this release does not know"


def unknown_kind(kind: str) -> str:
    """Words for a kind of attention without a rule."""
    return f"{UNKNOWN_KIND} ({kind[:64]}), so hits may be shorter than predicted; upgrade the gateway"


def store_only(medium: str) -> str:
    """Words for a slower tier that only ever stores."""
    return (
        f"the {medium[:64]} tier publishes no evictions, so hits may be shorter than predicted; its oldest blocks are "
        "forgotten, publish evictions if its connector can"
    )


def spared(medium: str) -> str:
    """Words for a slower tier that still had blocks when a reset was published."""
    return (
        f"a cache reset may have reached the {medium[:64]} tier or spared it, so hits may be shorter than predicted; "
        "restart the engine to empty every tier"
    )


class Limits:
    """An ordered record of limits, each once."""

    def __init__(self) -> None:
        self.words: tuple[str, ...] = ()
        """The limits, the oldest first."""
        self._is_lasting: dict[str, bool] = {}

    def note(self, words: str, *, lasting: bool = False) -> None:
        """Add a limit. A `lasting` one is about the layout. Beyond the most that are kept, further ones are left out."""
        if words not in self._is_lasting and len(self._is_lasting) < _MOST:
            self._is_lasting[words] = lasting
            self.words = tuple(self._is_lasting)

    def drop(self, words: str) -> None:
        """The events have shown that this is not a limit."""
        if self._is_lasting.pop(words, None) is not None:
            self.words = tuple(self._is_lasting)

    def clear(self) -> None:
        """Every block is gone: keep what is about the layout."""
        self._is_lasting = {words: True for words, lasting in self._is_lasting.items() if lasting}
        self.words = tuple(self._is_lasting)

    def reset(self) -> None:
        """Expect another engine."""
        self._is_lasting.clear()
        self.words = ()
