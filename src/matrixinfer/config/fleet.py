"""The models and the pods that a config file lists."""

from __future__ import annotations

from typing import Annotated, Literal

from matrixinfer.config.base import Section, described
from matrixinfer.config.tls import EngineTlsConfig

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
