"""Settings of one simulated engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from matrixinfer.sim.cache import Adapter
from matrixinfer.sim.model import Timing
from matrixinfer.sim.publisher import BUFFER_BATCHES


@dataclass(frozen=True, slots=True, kw_only=True)
class SimEngineConfig:
    """One replica. Raises `ValueError` for sizes below 1, or a `max_model_len` that the cache could never hold."""

    model: str = "sim"
    """The model's path or name: the `root` in `/v1/models`."""
    served_model_names: tuple[str, ...] = ()
    """Names that requests may use, the first being the engine's own. Empty: the model's."""
    loras: tuple[str, ...] = ()
    """Names of LoRA adapters. Requests for one compute blocks of its own."""
    data_parallel_size: int = 1
    """Ranks, each with a cache of its own."""
    block_size: int = 16
    num_blocks: int = 8192
    cpu_blocks: int = 0
    """Blocks kept on the CPU, also after they had to leave the GPU."""
    lazy_offload: bool = False
    """They are copied there only when they have to leave."""
    bare_cpu_events: bool = False
    """KV events of the CPU tier name its blocks without their tokens."""
    prefix_caching: bool = True
    """Without it nothing is kept of a prompt, and no event tells of one."""
    prompt_tokens_details: bool = True
    """Usage tells how many prompt tokens the cache held."""
    max_model_len: int | None = None
    """Tokens of prompt and reply together. None: as many as the cache holds."""
    max_batched_tokens: int = 2048
    max_sequences: int = 256
    default_max_tokens: int = 64
    """Length of a reply to a request that does not bound it."""
    timing: Timing = field(default_factory=Timing)
    host: str = "127.0.0.1"
    port: int = 0
    kv_port: int = 0
    replay_port: int = 0
    """Ports; 0 takes a free one. Rank n publishes n ports above those given for the KV events."""
    topic: str = ""
    """Topic of the KV events."""
    buffer_batches: int = BUFFER_BATCHES
    """Batches of KV events that can be replayed."""
    lose_frames: float = 0.0
    """Share of batches that are never sent live, only replayed; 0 to 1."""
    seed: int = 0
    """Of the replies, and of the frames lost. Replicas with the same seed give the same reply to the same prompt."""

    def __post_init__(self) -> None:
        sizes = (self.block_size, self.max_batched_tokens, self.max_sequences, self.default_max_tokens)
        if min(sizes) < 1 or self.cache_tokens < 2:
            raise ValueError("blocks, steps and replies need room for a token, the cache for two")
        if self.data_parallel_size < 1:
            raise ValueError("an engine has at least one rank")
        if min(self.cpu_blocks, self.buffer_batches) < 0 or not 0 <= self.lose_frames <= 1:
            raise ValueError("tiers and buffers have no less than nothing, and at most all frames can be lost")
        names = (*self.names, *self.loras)
        if len(set(names)) < len(names):
            raise ValueError("two models of one name")
        if self.context_length > self.cache_tokens:
            raise ValueError(f"max_model_len {self.max_model_len} exceeds the cache of {self.cache_tokens} tokens")

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may use."""
        return self.served_model_names or (self.model,)

    def adapter(self, name: str) -> Adapter | None:
        """Give the adapter that a request for `name` uses."""
        return Adapter(self.loras.index(name) + 1, name) if name in self.loras else None

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and reply together."""
        return self.cache_tokens if self.max_model_len is None else self.max_model_len
