"""What the gateway knows of each engine. A release that differs from this makes the watch fail.

`read` is what the gateway reads. `unread` is what it leaves aside on purpose, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

Reasons: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Known:
    """Names that a release is expected to have."""

    read: tuple[str, ...] = ()
    unread: Reasons = field(default_factory=dict)

    @property
    def all(self) -> set[str]:
        """Every name."""
        return {*self.read, *self.unread}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the names of an enumeration, or of constants with a prefix, are."""

    path: str
    name: str
    is_enum: bool = True


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine's sources."""

    package: str
    title: str
    events: str
    """The file with the events and their publisher."""
    structs: Mapping[str, Known]
    """The fields of each event, and of the batch."""
    media: Known
    media_in: Place
    parts: frozenset[int]
    """The numbers of parts of messages: those published, and those that answer a replay."""
    strings: Mapping[str, tuple[str, ...]]
    """Words that the gateway looks for over HTTP, by the file that has them: paths, keys, metrics."""
    kinds: Known | None = None
    """Kinds of attention; None for an engine that publishes none."""
    kinds_in: Place | None = None


_WHERE = "near or far, where `medium` says the tier"
_OWNERS = "which instance of a storage tier"
_SESSION = "who asked; no block depends on it"

_VLLM = Engine(
    package="vllm",
    title="vLLM",
    events="vllm/distributed/kv_events.py",
    structs={
        "KVEventBatch": Known(read=("ts", "events", "data_parallel_rank")),
        "BlockStored": Known(
            read=(
                "block_hashes",
                "parent_block_hash",
                "token_ids",
                "block_size",
                "lora_id",
                "medium",
                "lora_name",
                "extra_keys",
                "group_idx",
                "kv_cache_spec_kind",
                "kv_cache_spec_sliding_window",
                "lookahead_token_ids",
            ),
            unread={"locality": _WHERE, "ownership": _OWNERS, "session_id": _SESSION},
        ),
        "BlockRemoved": Known(
            read=("block_hashes", "medium", "group_idx"), unread={"locality": _WHERE, "ownership": _OWNERS}
        ),
        "AllBlocksCleared": Known(),
    },
    kinds=Known(
        read=(
            "full_attention",
            "mla_attention",
            "sink_full_attention",
            "sliding_window",
            "sliding_window_mla",
            "chunked_local_attention",
            "mamba",
        ),
        unread={
            "encoder_only_attention": "encoders keep no blocks between requests",
            "cross_attention": "vLLM caches no prefixes of models with it",
            "unknown": "a group of mixed kinds has no rule; the feed becomes `partial` and says so",
        },
    ),
    kinds_in=Place(path="vllm/v1/kv_cache_interface.py", name="KVCacheSpecKind"),
    media=Known(read=("GPU", "CPU", "STORAGE")),
    media_in=Place(path="vllm/distributed/kv_events.py", name="MEDIUM_", is_enum=False),
    parts=frozenset({3, 5}),
    strings={
        "vllm/entrypoints/serve/instrumentator/basic.py": ("/kv_event_sources", "/version"),
        "vllm/config/kv_events.py": ("enable_kv_cache_events", "publisher", "endpoint", "replay_endpoint", "topic"),
        "vllm/v1/metrics/loggers.py": (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:prefix_cache_queries",
            "vllm:prefix_cache_hits",
            "vllm:external_prefix_cache_hits",
        ),
    },
)

_SGLANG = Engine(
    package="sglang",
    title="SGLang",
    events="sglang/srt/disaggregation/kv_events.py",
    structs={
        "KVEventBatch": Known(read=("ts", "events", "attn_dp_rank")),
        "BlockStored": Known(
            read=(
                "block_hashes",
                "parent_block_hash",
                "token_ids",
                "block_size",
                "lora_id",
                "medium",
                "cache_salt",
                "lora_name",
            ),
            unread={"session_id": _SESSION},
        ),
        "BlockRemoved": Known(read=("block_hashes", "medium")),
        "AllBlocksCleared": Known(),
    },
    media=Known(read=("GPU", "CPU_PINNED", "DISK", "EXTERNAL")),
    media_in=Place(path="sglang/srt/disaggregation/kv_events.py", name="StorageMedium"),
    parts=frozenset({3, 5}),
    strings={
        "sglang/srt/runtime_context.py": (
            "publisher",
            "endpoint_host",
            "endpoint_port_base",
            "topic",
            "block_size",
            "dp_size",
            "replay_endpoint_port_base",
            "load_endpoint_port_base",
            "load_topic",
        ),
        "sglang/srt/observability/metrics_collector.py": (
            "sglang:num_running_reqs",
            "sglang:num_queue_reqs",
            "sglang:token_usage",
        ),
    },
)

ENGINES = (_VLLM, _SGLANG)
