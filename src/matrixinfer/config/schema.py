"""The schema: what a config file may say, key by key. The descriptions are the reference page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

CLUSTER_SUFFIX = ".svc.cluster.local"
"""What some write behind a pod's name, and others do not."""

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]


def described(description: str) -> Meta:
    """Attach the sentence that the reference shows for a field."""
    return Meta(description=description)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of every section: frozen, keyword-only, camelCase in YAML, unknown keys refused."""


class ModelConfig(Section, frozen=True):
    """A model that clients may ask for."""

    name: Annotated[str, described("The engine's own name for the model: the first id of its `/v1/models`.")]
    aliases: Annotated[tuple[str, ...], described("Other names under which clients may ask for it.")] = ()
    tokenizer: Annotated[
        str | None,
        described(
            "The model's folder, or the vocabulary's file in it, relative to the config file. "
            "Without it, prompts are tokenized by an engine's `/tokenize`."
        ),
    ] = None
    tokenizer_mode: Annotated[
        Literal["auto", "hf", "mistral", "tiktoken"],
        described(
            "How the vocabulary is read, as the engine does it (`--tokenizer-mode`): `hf` is a `tokenizer.json`; "
            "`mistral` is Mistral's own `tekken.json` or `tokenizer.model.v*` (extra `mistral`); `tiktoken` is a file of "
            "ranks (extra `tiktoken`). `auto` tells by the files, and leaves chats to the engine where that writes them "
            "without a template; every other mode is taken at its word."
        ),
    ] = "auto"
    pretokenizer: Annotated[
        Literal["cl100k", "kimi", "o200k", "qwen2"] | None,
        described(
            "How text is split before a tiktoken vocabulary is applied, which its file does not say. Needed only where "
            "the folder does not tell; `cl100k` is that of Llama 3 and GLM-4, too."
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        described(
            "Jinja file that overrides the tokenizer's own chat template, or `chatml` for the built-in one. "
            "Never guessed: a tokenizer without a template needs one named here to serve chats locally."
        ),
    ] = None


class KvEventsConfig(Section, frozen=True):
    """Where one engine publishes its KV events (ZMQ)."""

    endpoint: Annotated[str, described("PUB endpoint as seen from here, such as `tcp://10.0.0.1:5557`.")]
    replay_endpoint: Annotated[
        str | None, described("ROUTER endpoint that replays past batches. Without it a late start stays partly blind.")
    ] = None
    topic: Annotated[str | None, described("Take only this exact topic. By default every topic is taken.")] = None


class PodConfig(Section, frozen=True):
    """One engine replica."""

    name: Annotated[
        str,
        described(
            "Unique name, shown in headers, metrics and decisions, and known in Redis: on Kubernetes `pod.namespace`. "
            "`.svc.cluster.local` at its end is dropped."
        ),
    ]
    url: Annotated[str, described("Base URL of the engine's HTTP API, without `/v1`; a slash at its end is dropped.")]
    kv_events: Annotated[
        KvEventsConfig | Literal["discover", "none"],
        described("Endpoints of its KV events; `discover` asks its `/kv_event_sources`; `none` does not listen."),
    ] = "discover"


class IndexConfig(Section, frozen=True):
    """The index of which pod holds which block."""

    kind: Annotated[
        Literal["memory", "redis"],
        described(
            "`memory` keeps the index in the gateway's own process. `redis` looks blocks up in the Redis or Valkey server of "
            "`$.redis`, one round trip per request."
        ),
    ] = "memory"
    max_blocks: Annotated[
        Count,
        described(
            "Most distinct blocks kept in memory; beyond it the least recently stored are evicted, children first."
        ),
    ] = 4_000_000
    writer: Annotated[
        Literal["gateway", "agents", "none"],
        described(
            "Who writes what engines publish into Redis. `gateway`: this process follows the engines and writes, unless "
            "another one already does for a pod. `agents`: `matrixinfer agent` beside the engines. `none`: writers of other "
            "projects, or nobody."
        ),
    ] = "agents"
    warm_start: Annotated[
        bool,
        described("With kind `memory`: begin with what Redis knows, until each engine has told its own history."),
    ] = False
    max_age_seconds: Annotated[
        Seconds, described("Entries in Redis of pods without a living writer count for so long after their stamp.")
    ] = 86_400.0
    lease_seconds: Annotated[
        Annotated[float, Meta(ge=1)],
        described(
            "From a writer's last sign of life until another one may take its place, and until what it wrote is doubted. "
            "Clocks of processes may differ by half of it."
        ),
    ] = 15.0
    reclaim_keys_per_second: Annotated[
        Annotated[int, Meta(ge=0)],
        described("How many keys a writer looks through per second for entries that count no more; 0 for none."),
    ] = 1_000


class TlsConfig(Section, frozen=True):
    """TLS to Redis."""

    ca_file: Annotated[str | None, described("Certificates that are trusted; the system's by default.")] = None
    cert_file: Annotated[str | None, described("This client's certificate.")] = None
    key_file: Annotated[str | None, described("Its key.")] = None
    verify: Annotated[bool, described("Whether the server's certificate and name are checked.")] = True


class RedisConfig(Section, frozen=True):
    """A Redis or Valkey server, group of them behind Sentinel, or Cluster, in which processes share what they know."""

    host: Annotated[
        str | None, described("Host name or address. Default: the environment's `REDIS_HOST`, else `127.0.0.1`.")
    ] = None
    port: Annotated[
        Annotated[int, Meta(ge=1, le=65_535)] | None,
        described("Default: the environment's `REDIS_PORT`, else 6379."),
    ] = None
    socket: Annotated[str | None, described("Path of a Unix socket, instead of host and port.")] = None
    sentinels: Annotated[
        tuple[str, ...], described("`host:port` of Sentinels, which tell the master, instead of host and port.")
    ] = ()
    sentinel_service: Annotated[str, described("What the Sentinels call the master.")] = "mymaster"
    sentinel_username: Annotated[str | None, described("User of the Sentinels' access list.")] = None
    sentinel_password: Annotated[str | None, described("The Sentinels' own password, never shown.")] = None
    cluster: Annotated[bool, described("Host and port are of a node of a Redis Cluster.")] = False
    db: Annotated[Annotated[int, Meta(ge=0)], described("Number of the database; 0 on Cluster.")] = 0
    username: Annotated[str | None, described("User of the server's access list.")] = None
    password: Annotated[
        str | None, described("Its password, never shown. Default: the environment's `REDIS_PASSWORD`.")
    ] = None
    tls: Annotated[TlsConfig | None, described("TLS to the server, and to Sentinels; `{}` with the defaults.")] = None
    connections: Annotated[Count, described("Connections at most, to each server.")] = 32
    deadline_seconds: Annotated[
        Seconds, described("Deadline of a look-up; past it the request is routed without the index.")
    ] = 0.02
    scripts: Annotated[
        bool,
        described(
            "Look up by a script in the server, in a third of the time. `false`, on Cluster, and where the server refuses "
            "scripts: by a pipeline of reads."
        ),
    ] = True
    share_load: Annotated[
        bool, described("Tell other gateways at the same server what was sent where, and listen to them.")
    ] = True

    def __repr__(self) -> str:
        """Without the password."""
        return f"RedisConfig({self.where})"

    def __rich_repr__(self) -> Iterator[tuple[str, str]]:  # type: ignore[override]  # pairs are all that Rich needs
        """Likewise."""
        yield "where", self.where

    @property
    def where(self) -> str:
        """Which server, for people."""
        if self.socket is not None:
            return f"unix://{self.socket}"
        if self.sentinels:
            return f"{self.sentinel_service} of {', '.join(self.sentinels)}"
        return f"{self.host}:{self.port}"


class PluginRef(Section, frozen=True):
    """An enabled plugin and its weight (weights count for scorers only)."""

    name: Annotated[str, described("The plugin's name.")]
    weight: Annotated[float, Meta(ge=0), described("Factor of this plugin's score in the total.")] = 1.0


class PluginStage(Section, frozen=True):
    """The plugins of one stage, in order."""

    enabled: Annotated[
        tuple[str | PluginRef, ...], described("Names, or `{name, weight}`; run in the order given.")
    ] = ()


class PluginsConfig(Section, frozen=True, rename="pascal"):
    """Which plugins run at which stage."""

    filter: Annotated[PluginStage, described("Remove pods that must not take the request.")] = PluginStage(
        enabled=("least-request", "bounded-load")
    )
    score: Annotated[PluginStage, described("Rate each remaining pod 0 to 100; the weighted sum ranks them.")] = (
        PluginStage(enabled=("kvcache-aware", "least-prefill"))
    )
    picker: Annotated[PluginStage, described("Exactly one: turns totals into a ranking.")] = PluginStage(
        enabled=("max-score",)
    )
    post_schedule: Annotated[PluginStage, described("Told of each decision after it is taken.")] = PluginStage()


class PluginArgs(Section, frozen=True):
    """Arguments of one plugin."""

    name: Annotated[str, described("The plugin's name.")]
    args: Annotated[dict[str, Any], described("Its arguments; see the plugin's own table.")] = {}


class WeightsConfig(Section, frozen=True):
    """What a block counts for that a pod holds, where it is worth less than one in the device's memory."""

    host: Annotated[Share, described("Off-loaded to the host's memory.")] = 0.8
    storage: Annotated[Share, described("Off-loaded further: to disk, or to another machine.")] = 0.5
    unproven: Annotated[
        Share,
        described("Indexed while the pod's events are doubted, or not indexed but sent there by this gateway."),
    ] = 0.75


class SchedulerConfig(Section, frozen=True):
    """How a pod is chosen."""

    plugin_config: Annotated[
        tuple[PluginArgs, ...],
        described(
            "Arguments of plugins, by name. The default makes `kvcache-aware` match the whole prompt, and lets "
            "`bounded-load` keep a conversation on its pod through short bursts. A list given here replaces the whole "
            "default: plugins it does not name fall back to the defaults of their own tables."
        ),
    ] = (
        PluginArgs(name="kvcache-aware", args={"maxBlocksToMatch": 0}),
        PluginArgs(name="bounded-load", args={"minInFlight": 6}),
    )
    plugins: Annotated[PluginsConfig, described("The profile: which plugins run, and their weights.")] = PluginsConfig()
    max_prefix_tokens: Annotated[Count, described("Tokens of a prompt that are hashed and looked up at most.")] = (
        1_000_000
    )
    pending_seconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described("How long after a request ends its prefix still counts as held by its pod without an event."),
    ] = 2.0
    weights: Annotated[WeightsConfig, described("What blocks count for that are off-loaded or doubted.")] = (
        WeightsConfig()
    )
    decisions_kept: Annotated[
        Annotated[int, Meta(ge=0)],
        described("Decisions kept for `/debug/decisions` and `matrixinfer explain`; some 5 kB each, without prompts."),
    ] = 1000
    seed: Annotated[int, described("Seed of the generator that breaks ties.")] = 0


class TokenizationConfig(Section, frozen=True):
    """Limits of turning prompts into token ids."""

    timeout_seconds: Annotated[Seconds, described("Deadline of one prompt; past it the request is routed by load.")] = (
        2.0
    )
    max_prompt_bytes: Annotated[
        Count, described("Requests with a larger body are not tokenized but routed by load.")
    ] = 4 * 1024 * 1024
    cache_bytes: Annotated[
        Annotated[int, Meta(ge=0)],
        described("Memory of each configured tokenizer for what it has tokenized, so that only what is new is."),
    ] = 256 * 1024 * 1024


class DriftConfig(Section, frozen=True):
    """How what engines find in their caches is held against what the index says."""

    inject_usage: Annotated[
        bool,
        described(
            "Ask for usage in streams whose client does not (`stream_options.include_usage`), and keep the chunk that "
            "brings it from the client; vLLM's `system_fingerprint` goes with it. Without it such streams say nothing "
            "of what was cached."
        ),
    ] = False


class LimitsConfig(Section, frozen=True):
    """Bounds on requests."""

    max_body_bytes: Annotated[Count, described("Larger request bodies are answered with 413.")] = 64 * 1024 * 1024
    body_timeout_seconds: Annotated[
        Seconds, described("A request body that has not come whole after this long is answered with 408.")
    ] = 60.0
    request_timeout_seconds: Annotated[
        Seconds, described("A pod that sends nothing for this long ends the request (504 before the first byte).")
    ] = 600.0
    connect_timeout_seconds: Annotated[Seconds, described("Deadline of one connection attempt to a pod.")] = 5.0
    max_attempts: Annotated[Count, described("Pods tried at most before the first byte.")] = 3
    drain_seconds: Annotated[
        Annotated[float, Meta(ge=0)], described("How long requests in flight may finish after SIGTERM.")
    ] = 30.0


class PodWatchConfig(Section, frozen=True):
    """How pods are observed."""

    scrape_interval_seconds: Annotated[
        Seconds, described("Time between two reads of a pod's `/health` and `/metrics`.")
    ] = 1.0
    scrape_timeout_seconds: Annotated[Seconds, described("Deadline of one read.")] = 2.0
    stale_after_seconds: Annotated[Seconds, described("Engine metrics older than this count as unknown.")] = 5.0
    unhealthy_after_failures: Annotated[
        Count, described("Failures in a row (reads or requests) after which a pod is taken only as a last resort.")
    ] = 2
    discovery_interval_seconds: Annotated[Seconds, described("Time between two reads of a pod's `/v1/models`.")] = 30.0


class LogConfig(Section, frozen=True):
    """Log output (standard error)."""

    level: Annotated[Literal["debug", "info", "warning", "error"], described("Lowest level that is written.")] = "info"
    format: Annotated[Literal["json", "console"], described("One JSON object a line, or text for people.")] = "json"


class Config(Section, frozen=True):
    """The whole configuration."""

    listen: Annotated[str, described("Address of the API: `host:port`; port 0 takes a free one.")] = "127.0.0.1:8080"
    admin: Annotated[str | None, described("Address of `/debug/…`; keep it private. `null` turns it off.")] = (
        "127.0.0.1:8081"
    )
    models: Annotated[
        tuple[ModelConfig, ...], described("Models with settings of their own; others are found from the engines.")
    ] = ()
    pods: Annotated[tuple[PodConfig, ...], described("The engine replicas.")] = ()
    index: Annotated[IndexConfig, described("Which pod holds which block.")] = IndexConfig()
    redis: Annotated[
        RedisConfig | None,
        described(
            "Redis or Valkey, used by `index.kind: redis`, `index.writer: gateway`, `index.warmStart` and `matrixinfer agent`. They "
            "take the server from the environment, else 127.0.0.1:6379, where this is left out."
        ),
    ] = None
    scheduler: Annotated[SchedulerConfig, described("How a pod is chosen.")] = SchedulerConfig()
    tokenization: Annotated[TokenizationConfig, described("Limits of tokenizing prompts.")] = TokenizationConfig()
    drift: Annotated[DriftConfig, described("Holding what engines find against what the index says.")] = DriftConfig()
    limits: Annotated[LimitsConfig, described("Bounds on requests.")] = LimitsConfig()
    pod_watch: Annotated[PodWatchConfig, described("How pods are observed.")] = PodWatchConfig()
    log: Annotated[LogConfig, described("Log output.")] = LogConfig()
