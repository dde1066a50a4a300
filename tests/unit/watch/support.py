"""Sources of a made-up engine, in which a test changes one thing."""

from __future__ import annotations

from collections.abc import Mapping

from watch.known import Engine, Known, Place

EVENTS = '''
import msgspec

END = (-1).to_bytes(8, "big", signed=True)
MEDIUM_GPU = "GPU"
MEDIUM_CPU = "CPU"


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, tag=True):
    """The base."""


class BlockStored(KVCacheEvent):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None = None
    extra_keys: list | None = None
    session_id: str | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


class Publisher:
    def publish(self, topic, seq, payload):
        self.pub.send_multipart((topic, seq, payload))

    def replay(self, client, topic, seq, payload):
        self.router.send_multipart((client, b"", topic, seq, payload))
'''
KINDS = """
class Kind(str, Enum):
    FULL = "full_attention"
    MAMBA = "mamba"
    OTHER = "other"
"""
METRICS = 'RUNNING = Gauge(name="made:running")'

STORED = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
)
ENGINE = Engine(
    package="made",
    title="Made",
    events="made/events.py",
    structs={
        "KVEventBatch": Known(read=("ts", "events", "data_parallel_rank")),
        "BlockStored": Known(read=STORED, unread={"session_id": "who asked"}),
        "BlockRemoved": Known(read=("block_hashes", "medium")),
        "AllBlocksCleared": Known(),
    },
    kinds=Known(read=("full_attention", "mamba"), unread={"other": "it is not cached"}),
    kinds_in=Place(path="made/kinds.py", name="Kind"),
    media=Known(read=("GPU", "CPU")),
    media_in=Place(path="made/events.py", name="MEDIUM_", is_enum=False),
    parts=frozenset({3, 5}),
    strings={"made/metrics.py": ("made:running",)},
)


class MadeSources:
    def __init__(self, changes: Mapping[str, str | None] | None = None) -> None:
        self._files = {
            "made/events.py": EVENTS,
            "made/kinds.py": KINDS,
            "made/metrics.py": METRICS,
            **(changes or {}),
        }

    def text(self, path: str) -> str | None:
        return self._files.get(path)
