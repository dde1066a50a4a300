"""`matrixinfer tokenize`: the token ids of requests, as the gateway sees them."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from matrixinfer.cli import json_lines
from matrixinfer.cli.arguments import Subparsers
from matrixinfer.config import LimitsConfig, ModelConfig, TokenizationConfig
from matrixinfer.errors import ConfigError, InvalidRequest, TokenizeError
from matrixinfer.gateway.session import client_session
from matrixinfer.pods.engine_api import EngineApi, EngineDown
from matrixinfer.prompt import fields
from matrixinfer.prompt.base import Prompt, first_difference
from matrixinfer.prompt.manager import Tokenized, TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.prompt.requests import READERS, parse

_MODEL = "model"
_TIMEOUT_SECONDS = 60.0
_PROGRESS_LINES = 100
_PATHS = {"messages": CHAT_PATH, "prompt": COMPLETIONS_PATH, "input": "/v1/responses", "query": "/v1/rerank"}
"""The API of a body that has this key, where none is named."""

_BODY = msgspec.json.Decoder(dict[str, msgspec.Raw])


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "tokenize",
        help="the token ids of requests, as the gateway sees them",
        description='Read JSON lines of request bodies and write {"tokens": […]} or {"error": …} for each. Of a prompt '
        'with images, audio or video only the beginning is known ("complete": false).',
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the bodies; standard input without it")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="the model's folder, or its vocabulary")
    parser.add_argument("--chat-template", metavar="TEMPLATE", help="a Jinja file, or `chatml`, instead of the model's")
    parser.add_argument("--tokenizer-mode", default="auto", choices=["auto", "hf", "mistral", "tiktoken"])
    parser.add_argument("--pretokenizer", choices=["cl100k", "kimi", "o200k", "qwen2"], help="of tiktoken vocabularies")
    parser.add_argument(
        "--path",
        choices=sorted(READERS),
        metavar="PATH",
        help="the API of all bodies; without it, "
        + ", ".join(f"{path} for those with `{key}`" for key, path in _PATHS.items()),
    )
    parser.add_argument(
        "--compare",
        metavar="URL",
        help="an engine whose /tokenize is asked, too; exit code 1 when any ids differ, 3 when none could be compared",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer every line. Raises `ConfigError`."""
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    model = ModelConfig(
        name=_MODEL,
        tokenizer=args.tokenizer,
        tokenizer_mode=args.tokenizer_mode,
        pretokenizer=args.pretokenizer,
        chat_template=args.chat_template,
    )
    settings = TokenizationConfig(timeout_seconds=_TIMEOUT_SECONDS)
    async with AsyncExitStack() as stack:
        tokenizers = await stack.enter_async_context(TokenizerManager([model], settings, None))
        comparison: _Comparison | None = None
        if args.compare is not None:
            session = await stack.enter_async_context(client_session(LimitsConfig()))
            comparison = await _comparison(
                args.compare, EngineApi(session, _TIMEOUT_SECONDS), RemoteTokenizer(session, rests=False)
            )
        for line in json_lines.read(args.file):
            json_lines.write(await _answered(line, args.path, tokenizers, comparison))
    return 0 if comparison is None else comparison.tell()


async def _answered(
    line: bytes, path: str | None, tokenizers: TokenizerManager, comparison: _Comparison | None
) -> dict[str, object]:
    try:
        prompt = _prompt(line, path)
    except InvalidRequest as error:
        return {"error": str(error)}
    try:
        answer = _answer(await tokenizers.tokenize(prompt, model=_MODEL, engines=()))
    except TokenizeError as error:
        answer = {"error": str(error)}
    return answer if comparison is None else answer | await comparison.compare(prompt, answer)


def _prompt(line: bytes, path: str | None) -> Prompt:
    """The prompt of a body, whose model does not matter. Raises `InvalidRequest`."""
    body = fields.decode(_BODY, line)
    if path is None:
        path = next((path for key, path in _PATHS.items() if key in body), None)
    if path is None:
        raise InvalidRequest(
            f"the body has none of {', '.join(f'`{key}`' for key in _PATHS)}; name its API with --path"
        )
    body.setdefault("model", msgspec.Raw(msgspec.json.encode(_MODEL)))
    return parse(path, msgspec.json.encode(body))


def _answer(tokenized: Tokenized) -> dict[str, object]:
    tokens = tokenized.tokens
    return {"tokens": tokens.ids.tolist()} | ({} if tokens.complete else {"complete": False})


@dataclass(frozen=True)
class _AskedEngine:
    url: str
    engine: str | None

    def index_name(self, _: str) -> str | None:
        """One name serves."""
        return None


async def _comparison(url: str, api: EngineApi, remote: RemoteTokenizer) -> _Comparison:
    """Raises `ConfigError` when the engine does not tell what it serves."""
    try:
        served = await api.models(url.rstrip("/"))
    except EngineDown as error:
        raise ConfigError("--compare", str(error)) from error
    if served is None:
        raise ConfigError("--compare", f"{url}/v1/models names no model")
    return _Comparison(remote, _AskedEngine(url, served.engine), served.base_model)


class _Comparison:
    """Compares ids with an engine's, and counts."""

    def __init__(self, remote: RemoteTokenizer, engine: _AskedEngine, model: str) -> None:
        self._remote = remote
        self._engine = engine
        self._model = model
        self._same = self._differing = self._only_theirs = self._refused = 0

    async def compare(self, prompt: Prompt, answer: dict[str, Any]) -> dict[str, object]:
        """What to add to our answer."""
        if prompt.token_ids is not None or prompt.inexact is not None or not answer.get("complete", True):
            return {}
        self._progress()
        try:
            ids = await self._remote.tokenize(prompt, [self._engine], self._model, timeout_seconds=_TIMEOUT_SECONDS)
        except TokenizeError as error:
            self._refused += 1
            return {"engine_error": str(error)}
        theirs, ours = ids.tolist(), answer.get("tokens")
        if prompt.keep_last is not None:
            theirs = theirs[-prompt.keep_last :]
        if prompt.keep_first is not None:
            theirs = theirs[: prompt.keep_first]
        if ours is None:
            self._only_theirs += 1
            return {"engine_tokens": theirs}
        self._same += theirs == ours
        self._differing += theirs != ours
        if theirs == ours:
            return {}
        return {"first_difference": first_difference(ours, theirs), "engine_tokens": theirs}

    def tell(self) -> int:
        """Print the counts; returns the exit code."""
        print(
            f"{self._same} prompts have the engine's ids, {self._differing} differ, "
            f"{self._only_theirs} only the engine can tell, {self._refused} it does not tell",
            file=sys.stderr,
        )
        if self._differing:
            return 1
        return 0 if self._same else 3

    def _progress(self) -> None:
        done = self._same + self._differing + self._only_theirs + self._refused
        if sys.stderr.isatty() and done % _PROGRESS_LINES == 0:
            print(f"\r{done} compared, {self._differing} differ ", end="", file=sys.stderr, flush=True)
