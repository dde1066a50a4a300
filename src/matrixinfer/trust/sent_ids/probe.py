"""Finds out whether an engine makes the same answer from a prompt's token ids as from the prompt itself.

It is asked twice: with a short prompt, and with that prompt's token ids in a chat that says something else. Only an
engine that uses the ids, and nothing else, counts as many prompt tokens and answers alike.
"""

from __future__ import annotations

import random
from typing import Any

import aiohttp
import msgspec

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import UNREADABLE, MatrixInferError, TokenizeError, client_error
from matrixinfer.pods.engine_api import EngineApi, EngineDown, OutOfResources
from matrixinfer.pods.pod import Pod
from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import COMPLETIONS_PATH
from matrixinfer.trust.sent_ids.bodies import takes_ids, with_ids
from matrixinfer.trust.sent_ids.found import Probed

ANSWER_SECONDS = 60.0
"""How long the engine may take for one of the two, which may have to wait for other requests."""
_MAX_ANSWER_BYTES = 1024 * 1024
_REPLY_TOKENS = 8
_WORDS = ("the", "river", "of", "stone", "and", "light", "in", "water", "over", "time", "with", "wind", "from", "snow")
_COUNT = 9
_OTHER = "Say something else, and say it in very many more words than these: " + " ".join(_WORDS)


class _Failed(MatrixInferError):
    """The engine gave no answer to compare."""


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Choice(msgspec.Struct):
    message: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status}")
        self.status = status


_ANSWER = msgspec.json.Decoder(_Answer)
_TEMPLATE = msgspec.json.Decoder(dict[str, Any])


class IdsProber:
    """Asks engines over a session that adds the keys they require."""

    def __init__(self, session: aiohttp.ClientSession, tokenizers: TokenizerManager, registry: PodRegistry) -> None:
        self._session = session
        self._tokenizers = tokenizers
        self._registry = registry

    async def probe(self, pod: Pod, path: str) -> Probed:
        """Ask a pod's engine at `path`. Never raises `MatrixInferError`."""
        if not takes_ids(path, pod.engine):
            return Probed(path=path, outcome="ignored", why="engines of its kind have no field for token ids there")
        try:
            return await self._compare(pod, path)
        except _Failed as error:
            return Probed(path=path, outcome="failed", why=str(error))

    async def _compare(self, pod: Pod, path: str) -> Probed:
        text = " ".join(random.choices(_WORDS, k=_COUNT))  # noqa: S311 - protects nothing
        model = pod.base_model or ""
        if pod.engine == "sglang" and path != COMPLETIONS_PATH and (template := await self._own_stops(pod)):
            why = f"its chat template {template} may bring stop strings, which it leaves out with token ids"
            return Probed(path=path, outcome="differs", why=why)
        plain, other = _body(path, model, text), _body(path, model, _OTHER)
        ids = await self._ids(pod, path, plain, model)
        context_length = None if pod.served is None else pod.served.context_length
        carrying = None if context_length is None else with_ids(path, pod.engine, other, ids, context_length)
        if carrying is None:
            raise _Failed("the engine does not say how long prompts may be, or that is too short for the question")
        try:
            first = await self._ask(pod, path, plain)
        except _Refused as refusal:
            raise _Failed(f"{path} answered {refusal.status}") from refusal
        if first.usage.prompt_tokens != len(ids):
            why = f"the engine counts {first.usage.prompt_tokens} tokens in a prompt of {len(ids)} token ids"
            return Probed(path=path, outcome="differs", why=why)
        try:
            second = await self._ask(pod, path, carrying)
        except _Refused as refusal:
            return Probed(path=path, outcome="refused", why=f"{path} answered {refusal.status} to token ids")
        if second.usage.prompt_tokens != len(ids):
            return Probed(path=path, outcome="ignored", why="the engine answered the messages beside the token ids")
        if first.choices != second.choices:
            return Probed(path=path, outcome="differs", why="the answer to the token ids is not that to the prompt")
        return Probed(path=path, outcome="honoured")

    async def _ids(self, pod: Pod, path: str, body: bytes, model: str) -> TokenIds:
        try:
            read = await self._tokenizers.read(path, body)
            configured = self._registry.configured_name(model, [pod])
            tokenized = await self._tokenizers.tokenize(read, model=configured, engines=[pod])
        except TokenizeError as error:
            raise _Failed(f"the gateway cannot tokenize the question: {error}") from error
        return tokenized.tokens.ids

    async def _ask(self, pod: Pod, path: str, body: bytes) -> _Answer:
        """The answer; raises `_Refused` for the status of a client's fault, and `_Failed`."""
        try:
            async with self._session.post(
                f"{pod.url}{path}",
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
                allow_redirects=False,
            ) as response:
                if response.status in (400, 422):
                    raise _Refused(response.status)
                if response.status != 200:
                    raise _Failed(f"{path} answered {response.status}")
                return _ANSWER.decode(await _read(response))
        except UNREADABLE as error:
            raise _Failed(f"{path} answered with something else than a completion and its usage") from error
        except TimeoutError as error:
            raise _Failed(f"no answer within {ANSWER_SECONDS:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(client_error(error)) from error

    async def _own_stops(self, pod: Pod) -> str | None:
        """The chat template that SGLang was started with, if that may be one of its own with stop strings."""
        try:
            body = (await EngineApi(self._session, ANSWER_SECONDS).ask(f"{pod.url}/server_info")).body
            template = _TEMPLATE.decode(body).get("chat_template")
        except (EngineDown, OutOfResources, *UNREADABLE) as error:
            raise _Failed("/server_info, which names the chat template, cannot be read") from error
        return None if template is None or str(template).endswith(".jinja") else str(template)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = await response.content.read(_MAX_ANSWER_BYTES)
    while chunk := await response.content.read(_MAX_ANSWER_BYTES):
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            raise _Failed(f"the answer has more than {_MAX_ANSWER_BYTES} bytes")
    return body


def _body(path: str, model: str, text: str) -> bytes:
    prompt = {"prompt": text} if path == COMPLETIONS_PATH else {"messages": [{"role": "user", "content": text}]}
    return msgspec.json.encode({"model": model, **prompt, "max_tokens": _REPLY_TOKENS, "temperature": 0, "seed": 0})
