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
DROPPED_WINDOWS = (
    "speculative decoding drops blocks, and sliding windows look further beyond a hit than full attention, so hits may be "
    "longer than predicted; use vLLM 0.33 or later, whose blocks depend on the tokens after them instead"
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
EXTRA_KEYS = (
    "a page was stored again while it was there: clients send an extra_key, which events do not show, so hits may be "
    "shorter than predicted; use cache_salt instead"
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
REUSES_LESS = (
    "answers report less reuse than the events say, again and again, as with attention that is not in the events (SGLang's "
    "sliding windows and mamba), so hits may be shorter than the events say; predictions are scaled by what answers report, "
    "see reuse in /debug/pods"
)
UNTRIED = (
    "this engine's events are read as its source publishes them, but no such engine has been tried, so hits may be longer "
    "or shorter than predicted; compare them with `matrixinfer events record` and `events check`"
)
_OTHER_RANK = "its batches say that they are from data-parallel rank"
_FEWER_RANKS = "data-parallel ranks, but"
_NO_EVICTIONS = "publishes no evictions"
_MAYBE_CLEARED = "a cache reset may have reached"
UNKNOWN_EVENT = "an event type that this release does not know"
UNKNOWN_KIND = "an attention kind that this release does not know"

UNCONFIRMED = (
    "the connection to the publisher was lost, and the engine has not said since where it publishes, so what is indexed "
    "may be another engine's; let the gateway reach the engine's HTTP API"
)

HIDDEN_COMPONENTS = (
    "the model has sliding windows or states of mamba or linear attention, and SGLang does not publish which of them it "
    "holds, so hits may be shorter than predicted; start SGLang with --enable-cache-report, so that answers show it"
)


def other_rank(told: int, listed: str) -> str:
    """Words for a publisher whose batches name another rank than the one that it is listed as."""
    return (
        f"{_OTHER_RANK} {told}, but it is listed as {listed}, so what is indexed "
        "may be another rank's; set kvEvents.endpoint to the engine's own publisher, or report what /kv_event_sources says"
    )


def fewer_ranks(ranks: int, followed: int) -> str:
    """Words for an engine of which only some ranks publish."""
    publish = (
        "only 1 of them says where it publishes" if followed == 1 else f"only {followed} of them say where they publish"
    )
    return (
        f"the engine has {ranks} {_FEWER_RANKS} {publish}, so hits may be shorter than predicted; "
        "remove kvEvents, so that the engine says where each rank publishes, and enable the events of all ranks"
    )


def unknown_kind(kind: str) -> str:
    """Words for a kind of attention without a rule."""
    return f"{UNKNOWN_KIND} ({kind[:64]}), so hits may be shorter than predicted; upgrade the gateway"


def unknown_event(kind: str) -> str:
    """Words for a type of event that no layout has."""
    return (
        f"{UNKNOWN_EVENT} ({kind[:64]}), which may add or remove blocks, so hits may be longer or shorter than predicted; "
        "upgrade the gateway"
    )


def store_only(medium: str) -> str:
    """Words for a slower tier that only ever stores."""
    return (
        f"the {medium[:64]} tier {_NO_EVICTIONS}, so hits may be shorter than predicted; its oldest blocks are "
        "forgotten, publish evictions if its connector can"
    )


def spared(medium: str) -> str:
    """Words for a slower tier that still had blocks when a reset was published."""
    return (
        f"{_MAYBE_CLEARED} the {medium[:64]} tier or spared it, so hits may be shorter than predicted; "
        "restart the engine to empty every tier"
    )


_NAMES = (
    (CHUNKED, "chunk_size"),
    (CHUNKED_ALONE, "chunked_alone"),
    (SPARSE_WINDOWS, "sparse_windows"),
    (DROPPED_SIZES, "dropped_sizes"),
    (DROPPED_WINDOWS, "dropped_windows"),
    (FINE_STATES, "fine_states"),
    (UNLINKED, "unlinked_groups"),
    (SHARED_PAGES, "shared_pages"),
    (EXTRA_KEYS, "extra_keys"),
    (HIDDEN_COMPONENTS, "components"),
    (REUSES_LESS, "reuses_less"),
    (UNCONFIRMED, "unconfirmed"),
    (_OTHER_RANK, "other_rank"),
    (_FEWER_RANKS, "fewer_ranks"),
    (SLOWER_TIERS, "slower_tiers"),
    (ORPHANS, "orphans"),
    (MISFITS, "misfits"),
    (UNTRIED, "untried"),
    (UNKNOWN_KIND, "unknown_attention"),
    (UNKNOWN_EVENT, "unknown_events"),
    (_NO_EVICTIONS, "no_evictions"),
    (_MAYBE_CLEARED, "maybe_cleared"),
)
NAMES = (*(name for _, name in _NAMES), "other")
"""Short names of limits, for metrics."""


def name_of(words: str) -> str:
    """The short name of a limit."""
    return next((name for part, name in _NAMES if part in words), "other")


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
