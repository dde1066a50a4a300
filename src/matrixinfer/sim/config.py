"""Settings of one simulated engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from matrixinfer.sim.attention import Group, Layout
from matrixinfer.sim.model import Timing
from matrixinfer.sim.prefix_cache import Adapter
from matrixinfer.sim.publisher import BUFFER_BATCHES


@dataclass(frozen=True, slots=True, kw_only=True)
class SimEngineConfig:
    """Settings of one replica. Raises `ValueError` for values out of range, or a `max_model_len` that exceeds the cache."""

    flavor: Literal["vllm", "sglang"] = "vllm"
    """The engine that it behaves like: vLLM 0.32 or SGLang 0.5.23."""
    model: str = "sim"
    """Path or name of the model: the `root` in `/v1/models`."""
    served_model_names: tuple[str, ...] = ()
    """Names that requests may use; the first is the engine's own. Empty: the name of the model."""
    loras: tuple[str, ...] = ()
    """Names of LoRA adapters. Each has its own blocks."""
    max_loras: int = 4
    """How many adapters fit on the device at a time; all of them work at once here."""
    data_parallel_size: int = 1
    """Number of ranks. Each has its own cache."""
    block_size: int = 16
    attention: tuple[str, ...] = ("full",)
    """vLLM: the attention groups of the model, each `KIND[:TOKENS][@BLOCK_SIZE]`; see `attention.Group.parse`."""
    speculative: Literal["drop", "lookahead", "pairs"] | None = None
    """Speculative decoding: vLLM 0.32 drops the last block of each hit, vLLM 0.33 hashes the token after a block, and
    SGLang has pages of token pairs. No tokens are drafted."""
    lookahead_tokens: int = 1
    """How many tokens after a block its hash covers, with `lookahead`."""
    dense: bool = False
    """vLLM: windows and states are cached at every block, not only where a later prompt surely needs them."""
    num_blocks: int = 8192
    cpu_blocks: int = 0
    """Size of the CPU tier, which keeps blocks that the GPU evicts."""
    lazy_offload: bool = False
    """Copy a block to the CPU when the GPU evicts it, not when it is stored."""
    bare_cpu_events: bool = False
    """KV events of the CPU tier name blocks without their tokens."""
    prefix_caching: bool = True
    """If off, no block is cached and no event is published."""
    prompt_tokens_details: bool = True
    """vLLM: `usage` reports how many prompt tokens were cached."""
    cache_report: bool = False
    """The same for SGLang."""
    takes_ids: bool = True
    """Chats may bring the token ids of their prompts; releases before vLLM 0.27 and SGLang 0.5.15 ignore them."""
    load_feed: bool = False
    """SGLang: publish the load of each rank."""
    max_model_len: int | None = None
    """Maximum tokens of prompt and reply together. None: as many as the cache holds."""
    max_batched_tokens: int = 2048
    max_sequences: int = 256
    media_token: str | None = None
    """vLLM: what the chat template writes for an image, audio or video: the text of one token. None: there are none."""
    default_max_tokens: int = 64
    """Length of the reply to a request without `max_tokens`."""
    timing: Timing = field(default_factory=Timing)
    tokenize_seconds: float = 0.0
    """Time that `/tokenize` takes, besides tokenizing."""
    api_key: str | None = field(default=None, repr=False)
    """The key that requests must carry where the engine requires one. None: no key is required."""
    host: str = "127.0.0.1"
    port: int = 0
    kv_port: int = 0
    replay_port: int = 0
    load_port: int = 0
    """Ports; 0 means any free one. Rank n uses `kv_port + n`, `replay_port + n` and `load_port + n`."""
    topic: str = ""
    """Topic of the KV events."""
    buffer_batches: int = BUFFER_BATCHES
    """KV event batches that are kept for replay."""
    lose_frames: float = 0.0
    """Share of batches, 0 to 1, that are not sent live and can only be replayed."""
    seed: int = 0
    """Random seed of replies and lost frames. Replicas with the same seed give the same reply to the same prompt."""

    def __post_init__(self) -> None:
        sizes = (self.block_size, self.max_batched_tokens, self.max_sequences, self.default_max_tokens)
        if min(sizes) < 1 or self.num_blocks < 2 or self.cache_tokens < 2:
            raise ValueError(
                "expected block size, tokens per step, sequences and reply length of at least 1, and a cache of at least 2 tokens"
            )
        if self.data_parallel_size < 1:
            raise ValueError("expected at least one rank")
        if min(self.cpu_blocks, self.buffer_batches) < 0 or not 0 <= self.lose_frames <= 1:
            raise ValueError(
                "expected CPU blocks and replay batches of at least 0, and a share of lost frames from 0 to 1"
            )
        if self.flavor == "sglang":
            self._check_sglang()
        else:
            self._check_vllm()
        names = (*self.names, *self.loras)
        if len(set(names)) < len(names):
            raise ValueError("expected different names for all models and adapters, got the same name twice")
        if self.context_length > self.cache_tokens:
            raise ValueError(
                f"expected --max-model-len of at most {self.cache_tokens}, the tokens that the cache holds, got {self.max_model_len}"
            )

    def _check_vllm(self) -> None:
        if self.load_feed:
            raise ValueError("expected --flavor sglang with --load-publish-endpoint: vLLM publishes no load")
        if self.speculative == "pairs":
            raise ValueError("expected --flavor sglang with --speculative pairs")
        is_plain = len(self.layout.groups) == 1 and self.layout.groups[0].is_full and self.speculative is None
        if self.cpu_blocks and not is_plain:
            raise ValueError("expected --attention full, and no --speculative, with --cpu-blocks")

    def _check_sglang(self) -> None:
        if self.attention != ("full",):
            raise ValueError("expected --attention full with --flavor sglang, which publishes no other kind")
        if self.speculative not in (None, "pairs"):
            raise ValueError("expected --speculative pairs, or none, with --flavor sglang")
        if self.cpu_blocks:
            raise ValueError("expected no --cpu-blocks with --flavor sglang, whose slower tiers are not simulated")
        if self.media_token is not None:
            raise ValueError("expected no --media-token with --flavor sglang, whose media are not simulated")
        ports = (self.kv_port, self.replay_port, *([self.load_port] if self.load_feed else []))
        if self.data_parallel_size > 1 and not all(ports):
            raise ValueError(
                "expected --kv-events-port and --kv-replay-port with --flavor sglang and --data-parallel-size above 1, and "
                "`auto` or a port in --load-publish-endpoint if that is given: SGLang's ranks use consecutive ports"
            )

    @property
    def reports_cached(self) -> bool:
        """Whether `usage` reports how many prompt tokens were cached."""
        return self.cache_report if self.flavor == "sglang" else self.prompt_tokens_details

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may use."""
        return self.served_model_names or (self.model,)

    def adapter(self, name: str) -> Adapter | None:
        """The adapter that a request for `name` uses, if any."""
        return Adapter(self.loras.index(name) + 1, name) if name in self.loras else None

    @property
    def layout(self) -> Layout:
        """vLLM: the attention groups. Raises `ValueError`."""
        return Layout(
            groups=tuple(Group.parse(text, self.block_size) for text in self.attention),
            drop=self.speculative == "drop",
            lookahead=self.lookahead_tokens if self.speculative == "lookahead" else 0,
            dense=self.dense,
        )

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.layout.capacity(self.num_blocks - 1)

    @property
    def context_length(self) -> int:
        """Maximum tokens of prompt and reply together."""
        return self.cache_tokens if self.max_model_len is None else self.max_model_len
