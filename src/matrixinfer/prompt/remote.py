"""Token ids from the engine itself: vLLM's `/tokenize`."""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec
import numpy as np

from matrixinfer.blocks import TokenIds
from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat, Prompt, TokenId


class _Reply(msgspec.Struct):
    tokens: list[TokenId]


_REPLY = msgspec.json.Decoder(_Reply)


class RemoteTokenizer:
    """Asks an engine. It renders with its own template, so the ids are exact without any configuration."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        max_response_bytes: int = 32 * 1024 * 1024,
    ) -> None:
        self._session = session
        self._max_response_bytes = max_response_bytes

    async def tokenize(self, prompt: Prompt, url: str, model: str, *, timeout_seconds: float) -> TokenIds:
        """Ask the engine at the base URL `url` for the ids of `prompt`, shape (n,), as its model `model` sees it.

        Raises `TokenizeError` when it refuses, fails, answers nonsense or takes longer than `timeout_seconds`.
        """
        body = msgspec.json.encode(_question(prompt, model))
        try:
            async with self._session.post(
                f"{url.rstrip('/')}/tokenize",
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_seconds),
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    raise TokenizeError(f"{url}/tokenize answered {response.status}")
                answer = await self._read(response, url)
        except TimeoutError as error:
            raise TokenizeError(f"{url}/tokenize did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TokenizeError(f"{url}/tokenize is out of reach: {type(error).__name__}") from error
        try:
            return np.array(_REPLY.decode(answer).tokens, dtype=np.uint32)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TokenizeError(f"{url}/tokenize answered something else than token ids") from error

    async def _read(self, response: aiohttp.ClientResponse, url: str) -> bytes:
        answer = bytearray()
        async for chunk in response.content.iter_any():
            answer += chunk
            if len(answer) > self._max_response_bytes:
                raise TokenizeError(f"{url}/tokenize answered more than {self._max_response_bytes} bytes")
        return bytes(answer)


def _question(prompt: Prompt, model: str) -> dict[str, Any]:
    if prompt.chat is not None:
        return {"model": model, "add_special_tokens": prompt.add_special_tokens} | _chat(prompt.chat)
    if prompt.text is None:
        raise ValueError("a prompt of token ids needs no tokenizer")
    return {"model": model, "prompt": prompt.text, "add_special_tokens": prompt.add_special_tokens}


def _chat(chat: Chat) -> dict[str, Any]:
    # The endpoint has no field for documents, but the template's variables reach it all the same.
    variables = (chat.chat_template_kwargs or {}) | ({"documents": chat.documents} if chat.documents else {})
    optional = {"tools": chat.tools, "chat_template": chat.chat_template, "chat_template_kwargs": variables or None}
    return {
        "messages": chat.messages,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        **{key: value for key, value in optional.items() if value is not None},
    }
