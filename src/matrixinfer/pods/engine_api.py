"""Asks an engine over HTTP: its models, its kind, its publishers of KV events and its load. Supports vLLM and SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import msgspec

from matrixinfer.errors import UNREADABLE, MatrixInferError, client_error, shortage_in
from matrixinfer.pods.engine_kind import EngineFacts, kind_of
from matrixinfer.pods.metrics_text import parse_metrics
from matrixinfer.pods.model_cards import ModelCard, extra, natural
from matrixinfer.pods.pod import EngineMetrics, ServedNames
from matrixinfer.pods.publishers import KvSource, ServerInfo, parse_kv_sources, parse_server_info

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Longer answers are refused. The longest, vLLM's `/metrics`, has about 200 KB."""


class OutOfResources(MatrixInferError):
    """This process, or its machine, has no free descriptor, port or memory. That says nothing about the engine."""


class EngineDown(MatrixInferError):
    """The engine cannot be reached, does not answer in time, or answers with a server error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An engine's answer to a GET that is not a server error."""

    status: int
    body: bytes
    date: str | None
    """Its `Date` header: the time on the engine's clock, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What an engine says about itself, other than its models. None where it could not say now."""

    facts: EngineFacts | None
    sources: tuple[KvSource, ...] | None
    """Its publishers of KV events, one per data-parallel rank; empty if it has none."""


class EngineApi:
    """Reads the HTTP APIs of engines, each request within `timeout_seconds`. Every method may raise `EngineDown` and `OutOfResources`."""

    def __init__(self, session: aiohttp.ClientSession, timeout_seconds: float) -> None:
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    def reconfigure(self, timeout_seconds: float) -> None:
        """Wait so long for each answer from now on."""
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def models(self, url: str) -> ServedNames | None:
        """The model names that the engine serves; None if it does not report them (it may require an API key)."""
        body = await self._get(f"{url}/v1/models")
        return None if body is None else parse_models(body)

    async def about(self, url: str, owner: str | None) -> About:
        """Its kind, its version and its publishers, as its own answers say. `owner` is the owner of its models.

        vLLM has `/kv_event_sources`, and SGLang says the same in `/server_info`.
        """
        host, kind = urlsplit(url).hostname or "", kind_of(owner)
        if kind == "sglang":
            return await self._about_sglang(url, host)
        listed = await self._get(f"{url}/kv_event_sources")
        if listed is None and kind is None and (await self._optional_info(url, host)) is not None:
            return await self._about_sglang(url, host)
        kind = "vllm" if listed is not None else kind or "other"
        sources = () if listed is None else parse_kv_sources(listed, host=host)
        return About(facts=EngineFacts(kind=kind, version=await self._version(url)), sources=sources)

    async def _about_sglang(self, url: str, host: str) -> About:
        try:
            info = await self._server_info(url, host)
        except EngineDown:  # the answer takes the schedulers, which may be busy
            return About(facts=None, sources=None)
        model = parse_model_info(await self._optional(f"{url}/model_info") or b"")
        if model is None:  # in older releases
            model = parse_model_info(await self._optional(f"{url}/get_model_info") or b"") or ModelInfo()
        if info is None:
            info = ServerInfo(version=await self._version(url), ranks=1, sources=())
        sources = info.sources or parse_kv_sources(await self._optional(f"{url}/kv_event_sources") or b"", host=host)
        facts = EngineFacts(
            kind="sglang",
            version=info.version,
            ranks=info.ranks,
            architectures=(model.architectures or ())[:8],
            roots=tuple(dict.fromkeys(path for path in (model.tokenizer_path, model.model_path) if path)),
        )
        return About(facts=facts, sources=sources)

    async def _optional_info(self, url: str, host: str) -> ServerInfo | None:
        try:
            return await self._server_info(url, host)
        except EngineDown:
            return None

    async def _server_info(self, url: str, host: str) -> ServerInfo | None:
        for path in ("server_info", "get_server_info"):
            body = await self._get(f"{url}/{path}")
            info = None if body is None else parse_server_info(body, host=host)
            if info is not None:
                return info
        return None

    async def _version(self, url: str) -> str | None:
        return parse_version(await self._optional(f"{url}/version") or b"")

    async def _optional(self, url: str) -> bytes | None:
        """As `_get`; None if there is no answer, which proves nothing about the engine."""
        try:
            return await self._get(url)
        except EngineDown:
            return None

    async def check(self, url: str) -> None:
        """Check `/health`. Any answer but a server error counts as healthy, because some engines lack that path."""
        await self._get(f"{url}/health")

    async def metrics(self, url: str, *, now: float) -> EngineMetrics:
        """Its load; every value is None if it exports no metrics. `now` is the time of the reading, in seconds."""
        return parse_metrics(await self._get(f"{url}/metrics") or b"", read_at=now)

    async def _get(self, url: str) -> bytes | None:
        """The body of a 200 answer; None for any other status, such as 401 or 404."""
        answer = await self.ask(url)
        return answer.body if answer.status == 200 else None

    async def ask(self, url: str) -> Answer:
        """GET `url`. The body is read only if the status is 200. Raises `EngineDown` and `OutOfResources`."""
        try:
            async with self._session.get(url, timeout=self._timeout, allow_redirects=False) as response:
                if response.status >= 500:
                    raise EngineDown(f"{url} answered {response.status}")
                date = response.headers.get("Date")
                if response.status != 200:
                    return Answer(status=response.status, body=b"", date=date)
                chunks, size = [], 0
                async for chunk in response.content.iter_any():
                    size += len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise EngineDown(f"{url} answered with more than {MAX_BODY_BYTES} bytes")
                    chunks.append(chunk)
                return Answer(status=200, body=b"".join(chunks), date=date)
        except TimeoutError as error:
            raise EngineDown(f"{url} did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            shortage = shortage_in(error)
            if shortage is not None:
                raise OutOfResources(f"cannot ask {url}: {shortage}") from error
            raise EngineDown(f"{url}: {client_error(error)}") from error


_NULL = msgspec.Raw(b"null")


class _Card(msgspec.Struct):
    id: str
    parent: str | None = None
    owned_by: str | None = None
    root: str | None = None
    max_model_len: msgspec.Raw = _NULL
    created: msgspec.Raw = _NULL
    permission: msgspec.Raw = _NULL

    def card(self) -> ModelCard:
        return ModelCard(
            created=natural(self.created),
            root=self.root,
            max_model_len=natural(self.max_model_len),
            permission=extra(self.permission),
        )


class _Version(msgspec.Struct):
    version: str


class ModelInfo(msgspec.Struct, frozen=True):
    """SGLang's `/model_info`."""

    architectures: tuple[str, ...] | None = None
    model_path: str | None = None
    tokenizer_path: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


def parse_models(body: bytes) -> ServedNames | None:
    """The names in an engine's `/v1/models`; None if the answer is malformed or names no base model.

    Entries with a parent are adapters. All others are names of the same model; the first is the engine's own.
    """
    try:
        cards = msgspec.json.decode(body, type=_Cards).data
    except UNREADABLE:
        return None
    own = [card for card in cards if card.parent is None]
    if not own:
        return None
    adapters = {card.id: card.parent for card in cards if card.parent is not None}
    described = {card.id: card.card() for card in cards}
    return ServedNames(
        base_model=own[0].id,
        aliases=frozenset(card.id for card in own),
        adapters=adapters,
        engine=own[0].owned_by,
        root=own[0].root,
        context_length=described[own[0].id].max_model_len,
        cards=described,
    )


def parse_version(body: bytes) -> str | None:
    """The version in an engine's `/version`; None if the answer is malformed."""
    try:
        return msgspec.json.decode(body, type=_Version).version
    except UNREADABLE:
        return None


def parse_model_info(body: bytes) -> ModelInfo | None:
    """SGLang's `/model_info`; None if the answer is malformed."""
    try:
        return msgspec.json.decode(body, type=ModelInfo)
    except UNREADABLE:
        return None
