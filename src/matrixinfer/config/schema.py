"""The schema: every section and key of a config file. The descriptions become the reference page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta

from matrixinfer.config.access import AccessConfig
from matrixinfer.config.access_log import AccessLogConfig
from matrixinfer.config.admission import AdmissionConfig
from matrixinfer.config.api import ApiConfig
from matrixinfer.config.base import Count, Seconds, Section, Share, described
from matrixinfer.config.discovery import DiscoveryConfig
from matrixinfer.config.engine_keys import EngineKeysConfig
from matrixinfer.config.reload import ReloadConfig
from matrixinfer.config.routes import RouteConfig
from matrixinfer.config.scheduling import BlocksConfig, SchedulerConfig
from matrixinfer.config.tls import EngineTlsConfig, ListenerTlsConfig
from matrixinfer.config.tracing import TracingConfig

CLUSTER_SUFFIX = ".svc.cluster.local"
"""A suffix that some writers append to a pod's name and others leave out."""


class ModelConfig(Section, frozen=True):
    """A model that clients may ask for."""

    name: Annotated[str, described("The engine's own name for the model: the first id that its `/v1/models` lists.")]
    aliases: Annotated[tuple[str, ...], described("Other names by which clients may ask for it.")] = ()
    index_name: Annotated[
        str | None,
        described(
            "The model's name in Redis, where writers or readers of other projects use another name than the engine's. "
            "Its adapters keep their names."
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        described(
            "The model's folder, or the vocabulary file in it, relative to the config file. "
            "Without it, one is looked for (`tokenization.find`), else an engine's `/tokenize` tokenizes prompts."
        ),
    ] = None
    tokenizer_mode: Annotated[
        Literal["auto", "hf", "mistral", "tiktoken"],
        described(
            "How to read the vocabulary; use what the engine uses (`--tokenizer-mode`). `hf` reads a `tokenizer.json`; "
            "`mistral` reads Mistral's own `tekken.json` or `tokenizer.model.v*` (extra `mistral`); `tiktoken` reads a "
            "file of ranks (extra `tiktoken`). `auto` chooses by the files that it finds. If the engine formats chats "
            "without a template, `auto` leaves chats to the engine; the other modes never do."
        ),
    ] = "auto"
    pretokenizer: Annotated[
        Literal["cl100k", "kimi", "o200k", "qwen2"] | None,
        described(
            "How text is split before a tiktoken vocabulary is applied. The vocabulary file does not say it, so set this "
            "if the folder has no other file that does. `cl100k` is also right for Llama 3 and GLM-4."
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        described(
            "Jinja file that overrides the tokenizer's own chat template, or `chatml` for the built-in one. "
            "It is never guessed: a tokenizer without a template needs one here to tokenize chats locally."
        ),
    ] = None
    api_key_file: Annotated[
        str | None,
        described(
            "File with the API key that its engines require, relative to the config file, for pods that name none."
        ),
    ] = None
    api_key_env: Annotated[str | None, described("Environment variable with that key.")] = None


class KvEventsConfig(Section, frozen=True):
    """Where one engine publishes its KV events (ZMQ)."""

    endpoint: Annotated[str, described("PUB endpoint as reached from here, such as `tcp://10.0.0.1:5557`.")]
    replay_endpoint: Annotated[
        str | None,
        described(
            "ROUTER endpoint that replays past batches. Without it, what the engine cached before this process started "
            "stays unknown."
        ),
    ] = None
    topic: Annotated[str | None, described("Read only this exact topic. By default, every topic is read.")] = None


class PodConfig(Section, frozen=True):
    """One engine replica."""

    name: Annotated[
        str,
        described(
            "Unique name, used in headers, metrics, decisions and Redis; on Kubernetes `pod.namespace`. "
            "A trailing `.svc.cluster.local` is dropped."
        ),
    ]
    url: Annotated[str, described("Base URL of the engine's HTTP API, without `/v1`; a trailing slash is dropped.")]
    kv_events: Annotated[
        KvEventsConfig | Literal["discover", "none"],
        described(
            "Endpoints of its KV events. `discover` asks the engine (`/kv_event_sources`; SGLang: `/server_info`); `none` does not listen."
        ),
    ] = "discover"
    model: Annotated[
        str | None,
        described(
            "The engine's own name for its model, for engines that cannot be asked. Once the engine says what it serves, "
            "that counts."
        ),
    ] = None
    api_key_file: Annotated[
        str | None,
        described(
            "File with the API key that the engine requires (`--api-key`), relative to the config file. By default the key "
            "of its model, else that of `engineKeys`."
        ),
    ] = None
    api_key_env: Annotated[str | None, described("Environment variable with that key.")] = None
    tls: Annotated[EngineTlsConfig | None, described("TLS to this engine. By default that of `engineTls`.")] = None


class IndexConfig(Section, frozen=True):
    """The index: which pod holds which block."""

    kind: Annotated[
        Literal["memory", "redis"],
        described(
            "`memory` keeps the index in the gateway's own process. `redis` looks blocks up in the Redis or Valkey server of "
            "`$.redis`, with one round trip per request."
        ),
    ] = "memory"
    max_blocks: Annotated[
        Count,
        described(
            "Most distinct blocks kept in memory. Beyond it, the blocks stored longest ago are evicted, children first."
        ),
    ] = 4_000_000
    writer: Annotated[
        Literal["gateway", "agents", "none"],
        described(
            "Who writes what engines publish into Redis. `gateway`: this process follows the engines and writes, unless "
            "another process already writes for a pod. `agents`: `matrixinfer agent`, running beside the engines. `none`: "
            "writers of other projects, or nobody."
        ),
    ] = "agents"
    warm_start: Annotated[
        bool,
        described("With kind `memory`: start with what Redis knows, until each engine has replayed its own history."),
    ] = False
    max_age_seconds: Annotated[
        Seconds,
        described("How long an entry in Redis counts after it was written, if no running writer owns its pod."),
    ] = 86_400.0
    lease_seconds: Annotated[
        Annotated[float, Meta(ge=1)],
        described(
            "How long after a writer's last sign of life another writer may take over, and what it wrote becomes doubtful. "
            "The clocks of processes may differ by half of it."
        ),
    ] = 15.0
    reclaim_keys_per_second: Annotated[
        Annotated[int, Meta(ge=0)],
        described("How many keys per second a writer scans for entries that no longer count; 0 turns the scan off."),
    ] = 1_000


class TlsConfig(Section, frozen=True):
    """TLS to Redis. Relative paths start from the config file's folder."""

    ca_file: Annotated[str | None, described("Certificates to trust. By default, those that the system trusts.")] = None
    cert_file: Annotated[str | None, described("This client's certificate.")] = None
    key_file: Annotated[str | None, described("The key of this client's certificate.")] = None
    verify: Annotated[bool, described("Whether to check the server's certificate and name.")] = True


class RedisConfig(Section, frozen=True):
    """The Redis or Valkey through which processes share what they know: one server, a Sentinel group, or a Cluster."""

    host: Annotated[
        str | None,
        described("Host name or address. Default: the environment variable `REDIS_HOST`, else `127.0.0.1`."),
    ] = None
    port: Annotated[
        Annotated[int, Meta(ge=1, le=65_535)] | None,
        described("Default: the environment variable `REDIS_PORT`, else 6379."),
    ] = None
    socket: Annotated[str | None, described("Path of a Unix socket. Replaces host and port.")] = None
    sentinels: Annotated[
        tuple[str, ...],
        described("Addresses (`host:port`) of Sentinels, which name the master. Replaces host and port."),
    ] = ()
    sentinel_service: Annotated[str, described("The name by which the Sentinels know the master.")] = "mymaster"
    sentinel_username: Annotated[str | None, described("User name for the Sentinels.")] = None
    sentinel_password: Annotated[str | None, described("Password for the Sentinels. Never shown.")] = None
    cluster: Annotated[bool, described("Whether host and port are those of a Redis Cluster's node.")] = False
    db: Annotated[Annotated[int, Meta(ge=0)], described("Number of the database. A Cluster has only 0.")] = 0
    username: Annotated[str | None, described("User name for the server.")] = None
    password: Annotated[
        str | None,
        described("Password for the server. Never shown. Default: the environment variable `REDIS_PASSWORD`."),
    ] = None
    tls: Annotated[
        TlsConfig | None, described("TLS to the server and the Sentinels. `{}` turns it on with the defaults.")
    ] = None
    connections: Annotated[Count, described("Most connections to each server.")] = 32
    deadline_seconds: Annotated[
        Seconds, described("Deadline of a lookup. A request whose lookup takes longer is routed without the index.")
    ] = 0.02
    scripts: Annotated[
        bool,
        described(
            "Whether to look up with a script in the server, which takes a third of the time. With `false`, on a Cluster, "
            "and on servers that refuse scripts, lookups are a pipeline of reads."
        ),
    ] = True
    share_load: Annotated[
        bool,
        described("Whether to exchange with other gateways on the same server what was sent to which pod."),
    ] = True

    def __repr__(self) -> str:
        """Show no password."""
        return f"RedisConfig({self.where})"

    def __rich_repr__(self) -> Iterator[tuple[str, str]]:  # type: ignore[override]  # pairs are all that Rich needs
        """Show no password."""
        yield "where", self.where

    @property
    def where(self) -> str:
        """Address of the server, for people."""
        if self.socket is not None:
            return f"unix://{self.socket}"
        if self.sentinels:
            return f"{self.sentinel_service} of {', '.join(self.sentinels)}"
        return f"{self.host}:{self.port}"


class TokenizationConfig(Section, frozen=True):
    """How prompts become token ids, and the limits on that."""

    find: Annotated[
        Literal["local", "download", "none"],
        described(
            "Where to look for the tokenizer of a model that has none configured. `local`: the path that the engine reports, "
            "if it is on this machine, and Hugging Face's cache. `download`: also the Hugging Face Hub (extra `hub`), for "
            "tokenizer and template files, never weights. `none`: nowhere; engines are asked. What is found is used only "
            "if its token ids equal the engine's on samples that are hard to tokenize."
        ),
    ] = "local"
    download_seconds: Annotated[Seconds, described("Deadline of one download.")] = 120.0
    send_ids: Annotated[
        Literal["never", "when_verified"],
        described(
            "Whether engines get the token ids of plain prompts with the request, so that they need not render and tokenize "
            "them again. `when_verified`: where an engine's events have shown that our ids are its own, and it has answered "
            "a short question the same way with token ids as without."
        ),
    ] = "never"
    wait_milliseconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described(
            "Where an engine is asked for token ids, a decision waits for them this long. Without them, it is made by what "
            "was sent where and by load; the ids then come later and are used for the accounts."
        ),
    ] = 5.0
    timeout_seconds: Annotated[
        Seconds, described("Deadline for one prompt. A request whose prompt takes longer is routed by load.")
    ] = 2.0
    max_prompt_bytes: Annotated[
        Count,
        described(
            "Larger requests are not decoded and tokenized; they are routed by load, and by where their bytes were sent "
            "lately. Images, audio and video do not count. Token ids may have four times as many bytes."
        ),
    ] = 4 * 1024 * 1024
    max_prompt_items: Annotated[
        Count,
        described(
            "Requests with more messages, parts of messages, tools, tool calls and documents are routed in the same way."
        ),
    ] = 10_000
    cache_bytes: Annotated[
        Annotated[int, Meta(ge=0)],
        described(
            "Memory in which each tokenizer remembers prompts, so that only the new part of a conversation is tokenized; "
            "and, once more, in which the answers of engines that were asked are remembered."
        ),
    ] = 256 * 1024 * 1024


class DriftConfig(Section, frozen=True):
    """How cache hits that engines report are compared with what the index predicted."""

    inject_usage: Annotated[
        bool,
        described(
            "Whether to ask for usage (`stream_options.include_usage`) in streams whose client does not, and to remove the "
            "usage chunk before the client sees it; vLLM's `system_fingerprint` goes with it. Without it, such streams do "
            "not report what was cached."
        ),
    ] = False


class LimitsConfig(Section, frozen=True):
    """Limits on requests."""

    max_body_bytes: Annotated[Count, described("Larger request bodies are answered with 413.")] = 64 * 1024 * 1024
    memory_bytes: Annotated[
        Annotated[int, Meta(ge=16 * 1024 * 1024)],
        described(
            "Memory for all requests together. Bytes of bodies count twice until the answer ends, because they are kept and "
            "rewritten; what is decoded from them counts while it is tokenized. Bodies beyond it are answered with 503. An "
            "eighth is kept free for small requests."
        ),
    ] = 2 * 1024 * 1024 * 1024
    body_timeout_seconds: Annotated[
        Seconds, described("A request whose body takes longer to arrive is answered with 408.")
    ] = 60.0
    request_timeout_seconds: Annotated[
        Seconds, described("A request ends after this long, however much of its answer has come.")
    ] = 3600.0
    first_byte_timeout_seconds: Annotated[
        Seconds,
        described(
            "A request is answered with 504 when the first byte of its answer takes longer. Answers that are not streamed "
            "begin when they are complete."
        ),
    ] = 600.0
    idle_timeout_seconds: Annotated[
        Seconds,
        described("A stream ends when its pod sends nothing, or its client reads nothing, for this long."),
    ] = 300.0
    connect_timeout_seconds: Annotated[Seconds, described("Deadline of one attempt to connect to a pod.")] = 5.0
    max_attempts: Annotated[Count, described("Most pods tried before the first byte.")] = 3


class ConnectionsConfig(Section, frozen=True):
    """Limits on clients' connections."""

    max: Annotated[
        Count | None,
        described(
            "Most connections of clients at a time; further ones are answered with 503. By default a third of the file "
            "descriptors that this process may have, which leaves enough for engines and the admin listener."
        ),
    ] = None
    head_timeout_seconds: Annotated[
        Seconds, described("A connection whose request line and headers take longer to arrive is closed with 408.")
    ] = 15.0
    keep_alive_seconds: Annotated[
        Seconds, described("How long a connection without a request is kept. Balancers in front should close earlier.")
    ] = 75.0


class DrainConfig(Section, frozen=True):
    """What happens after SIGTERM. A second signal cuts off what is left."""

    delay_seconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described(
            "How long requests are still accepted while `/ready` answers 503, so that balancers can notice. Ctrl-C skips it."
        ),
    ] = 3.0
    timeout_seconds: Annotated[
        Annotated[float, Meta(ge=0)], described("How long requests in flight may then take to finish.")
    ] = 30.0


class RetriesConfig(Section, frozen=True):
    """When a request is sent to another pod. Never after the first byte of an answer; `limits.maxAttempts` bounds the pods."""

    statuses: Annotated[
        tuple[Annotated[int, Meta(ge=400, le=599)], ...],
        described("Statuses of an answer that is not passed on while another pod may be tried."),
    ] = (429, 502, 503, 504)
    after_send: Annotated[
        Annotated[int, Meta(ge=0)],
        described(
            "How many further pods get a request that a pod received and did not answer, as it broke the connection or went "
            "down: the request itself may be what breaks engines."
        ),
    ] = 1
    budget_share: Annotated[
        Share, described("Retries allowed per request, so that retries cannot multiply an overload.")
    ] = 0.2
    budget_per_second: Annotated[
        Annotated[float, Meta(ge=0)], described("Retries per second that are allowed however few requests there are.")
    ] = 10.0
    jitter_seconds: Annotated[
        Annotated[float, Meta(ge=0)],
        described("Longest random pause before a retry. It doubles with each further one."),
    ] = 0.02


class OutliersConfig(Section, frozen=True):
    """Endpoints that fail requests are ejected: for a while they get none."""

    consecutive_failures: Annotated[
        Count,
        described(
            "Failures in a row after which an endpoint is ejected: server errors, broken connections, malformed answers "
            "and timeouts. 429 and 503 count as busy, not as failures, and failures that are the request's fault do not count."
        ),
    ] = 3
    failure_share: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        described("Share of failed requests in `windowSeconds` from which on an endpoint is ejected."),
    ] = 0.5
    min_requests: Annotated[Count, described("Fewest requests in `windowSeconds` that make a share.")] = 10
    window_seconds: Annotated[Seconds, described("How far back the failure share looks.")] = 30.0
    eject_seconds: Annotated[
        Seconds, described("Length of the first ejection. Each further one lasts twice as long.")
    ] = 5.0
    max_eject_seconds: Annotated[Seconds, described("Length of the longest ejection.")] = 300.0
    max_ejected_share: Annotated[
        Share,
        described(
            "Largest share of a model's endpoints, rounded up, that is left out of a decision because of ejections. At "
            "least one always remains. 0 turns ejection off."
        ),
    ] = 0.5
    busy_seconds: Annotated[
        Seconds,
        described("How long an endpoint that answers 429 or 503 without a `Retry-After` is left alone, at first."),
    ] = 1.0
    max_busy_seconds: Annotated[Seconds, described("How long a `Retry-After` is honoured at most.")] = 30.0


class PodWatchConfig(Section, frozen=True):
    """How pods are observed."""

    scrape_interval_seconds: Annotated[
        Seconds, described("Time between two reads of a pod's `/health` and `/metrics`.")
    ] = 1.0
    scrape_timeout_seconds: Annotated[Seconds, described("Deadline of one read.")] = 2.0
    stale_after_seconds: Annotated[Seconds, described("Engine metrics older than this count as unknown.")] = 5.0
    unhealthy_after_failures: Annotated[
        Count,
        described("After this many failed reads or requests in a row, a pod is used only as a last resort."),
    ] = 2
    discovery_interval_seconds: Annotated[
        Seconds, described("Time between two questions to a pod what it is (`/v1/models` and others).")
    ] = 30.0


class LogConfig(Section, frozen=True):
    """Log output, to standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], described("Lowest level that is written.")] = "info"
    format: Annotated[Literal["json", "console"], described("One JSON object per line, or text for people.")] = "json"


class Config(Section, frozen=True):
    """The whole configuration."""

    listen: Annotated[
        str, described("Address of the API: `host:port`. Port 0 takes a free port; `[::]` stands for IPv4 as well.")
    ] = "127.0.0.1:8080"
    workers: Annotated[
        Annotated[int, Meta(ge=1, le=64)],
        described(
            "How many processes serve `listen`. Each follows the engines by itself and has an index of its own; limits on "
            "memory, connections and retries are divided among them."
        ),
    ] = 1
    admin: Annotated[str | None, described("Address of `/debug/…`. Keep it private. `null` turns it off.")] = (
        "127.0.0.1:8081"
    )
    admin_names: Annotated[
        tuple[str, ...],
        described(
            "Host names by which the admin listener may be addressed, beside IP addresses and names without dots. Others are "
            "answered with 403, so that a web page cannot reach it through a name of its own."
        ),
    ] = ()
    tls: Annotated[ListenerTlsConfig | None, described("TLS of the API. `null` serves plain HTTP.")] = None
    admin_tls: Annotated[ListenerTlsConfig | None, described("TLS of the admin listener.")] = None
    engine_tls: Annotated[
        EngineTlsConfig | None,
        described(
            "TLS to engines with `https` URLs whose pod has none of its own. `null` trusts what the system trusts."
        ),
    ] = None
    public_metrics: Annotated[
        bool, described("Whether `/metrics` is served at `listen` as well, and not at `admin` alone.")
    ] = True
    models: Annotated[
        tuple[ModelConfig, ...],
        described("Models that need settings of their own. All others are discovered from the engines."),
    ] = ()
    pods: Annotated[tuple[PodConfig, ...], described("The engine replicas.")] = ()
    discovery: Annotated[DiscoveryConfig, described("Where further pods come from, and how pods come and go.")] = (
        DiscoveryConfig()
    )
    routes: Annotated[
        tuple[RouteConfig, ...],
        described("Which model, and which pods, requests for a name get. Without a route it is the one of that name."),
    ] = ()
    engine_keys: Annotated[EngineKeysConfig, described("The API key of engines whose pod and model name none.")] = (
        EngineKeysConfig()
    )
    access: Annotated[
        AccessConfig | None, described("Who may use the gateway. By default everybody who reaches it may.")
    ] = None
    admission: Annotated[
        AdmissionConfig | None,
        described("How many requests are sent to engines at a time. By default as many as come."),
    ] = None
    blocks: Annotated[BlocksConfig, described("How prompts and caches are cut into blocks.")] = BlocksConfig()
    index: Annotated[IndexConfig, described("Which pod holds which block.")] = IndexConfig()
    redis: Annotated[
        RedisConfig | None,
        described(
            "Redis or Valkey, used by `index.kind: redis`, `index.writer: gateway`, `index.warmStart` and `matrixinfer agent`. If "
            "it is left out, they take the server from the environment, else 127.0.0.1:6379."
        ),
    ] = None
    scheduler: Annotated[SchedulerConfig, described("How a pod is chosen.")] = SchedulerConfig()
    tokenization: Annotated[TokenizationConfig, described("How prompts become token ids.")] = TokenizationConfig()
    drift: Annotated[
        DriftConfig, described("How hits that engines report are compared with what the index predicted.")
    ] = DriftConfig()
    api: Annotated[ApiConfig, described("What clients may use, and how they are answered.")] = ApiConfig()
    limits: Annotated[LimitsConfig, described("Limits on requests.")] = LimitsConfig()
    pod_watch: Annotated[PodWatchConfig, described("How pods are observed.")] = PodWatchConfig()
    connections: Annotated[ConnectionsConfig, described("Limits on clients' connections.")] = ConnectionsConfig()
    drain: Annotated[DrainConfig, described("What happens after SIGTERM.")] = DrainConfig()
    retries: Annotated[RetriesConfig, described("When a request is sent to another pod.")] = RetriesConfig()
    outliers: Annotated[OutliersConfig, described("Which endpoints get no requests because they fail them.")] = (
        OutliersConfig()
    )
    reload: Annotated[ReloadConfig, described("When the config file is read again.")] = ReloadConfig()
    log: Annotated[LogConfig, described("Log output.")] = LogConfig()
    access_log: Annotated[AccessLogConfig | None, described("One line about each request. `null` writes none.")] = None
    tracing: Annotated[TracingConfig, described("OpenTelemetry traces of requests.")] = TracingConfig()
