"""The schema: every section and key of a config file. The descriptions become the reference page."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from matrixinfer.config.access import AccessConfig
from matrixinfer.config.access_log import AccessLogConfig
from matrixinfer.config.admission import AdmissionConfig
from matrixinfer.config.api import ApiConfig
from matrixinfer.config.base import Count, Seconds, Section, described
from matrixinfer.config.discovery import DiscoveryConfig
from matrixinfer.config.engine_keys import EngineKeysConfig
from matrixinfer.config.fleet import ModelConfig, PodConfig
from matrixinfer.config.index import IndexConfig, RedisConfig
from matrixinfer.config.limits import (
    ConnectionsConfig,
    DrainConfig,
    LimitsConfig,
    OutliersConfig,
    PodWatchConfig,
    RetriesConfig,
)
from matrixinfer.config.reload import ReloadConfig
from matrixinfer.config.routes import RouteConfig
from matrixinfer.config.scheduling import BlocksConfig, SchedulerConfig
from matrixinfer.config.tls import EngineTlsConfig, ListenerTlsConfig
from matrixinfer.config.tracing import TracingConfig


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
            "and, once more, in which the answers of engines that were asked are remembered. Chats that may go on take up "
            "to another quarter of it, once for all models."
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
