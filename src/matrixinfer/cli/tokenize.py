"""`matrixinfer tokenize`: prints the token ids of requests, as the gateway computes them."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from matrixinfer.cli import json_lines
from matrixinfer.cli.arguments import Subparsers, add_engine_key, engine_key
from matrixinfer.config import ModelConfig, TokenizationConfig
from matrixinfer.errors import ConfigError, InvalidRequest, TokenizeError
from matrixinfer.pods.engine_api import EngineApi, EngineDown, OutOfResources
from matrixinfer.pods.session import client_session
from matrixinfer.prompt import fields
from matrixinfer.prompt.base import Prompt, Tokenized, first_difference
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.remote import RemoteTokenizer
from matrixinfer.prompt.requests import READERS, parse
from matrixinfer.prompt.tokenizer_files import DOWNLOADS

_MODEL = "model"
_TIMEOUT_SECONDS = 60.0
_PROGRESS_LINES = 100
_PATHS = {"messages": CHAT_PATH, "prompt": COMPLETIONS_PATH, "input": "/v1/responses", "query": "/v1/rerank"}
"""The API of a request body, by a key that it has, unless `--path` names the API."""

_BODY = msgspec.json.Decoder(dict[str, msgspec.Raw])


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "tokenize",
        help="print the token ids of requests, as the gateway computes them",
        description='Read JSON lines of request bodies and write {"tokens": […]} or {"error": …} for each. Only the '
        'tokens before the first image, audio or video of a prompt are known; then "complete" is false.',
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="file with the bodies (default: standard input)"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="folder of the model's tokenizer, or a vocabulary file"
    )
    parser.add_argument(
        "--chat-template", metavar="TEMPLATE", help="Jinja file, or `chatml` (default: the model's own)"
    )
    parser.add_argument(
        "--tokenizer-mode",
        default="auto",
        choices=["auto", "hf", "mistral", "tiktoken"],
        help="format of the tokenizer's files (default: %(default)s)",
    )
    parser.add_argument(
        "--pretokenizer",
        choices=["cl100k", "kimi", "o200k", "qwen2"],
        help="how a tiktoken vocabulary splits text before encoding it",
    )
    parser.add_argument(
        "--path",
        choices=sorted(READERS),
        metavar="PATH",
        help=f"the API of all bodies: one of {', '.join(sorted(READERS))} (default: by the keys of a body, "
        + ", ".join(f"`{key}` means {path}" for key, path in _PATHS.items())
        + ")",
    )
    parser.add_argument(
        "--compare",
        metavar="URL",
        help="compare with the ids of the engine at URL, from its /tokenize; exit code 1 when any ids differ, 3 when none "
        "could be compared",
    )
    add_engine_key(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer every line. Raises `ConfigError`."""
    try:
        return asyncio.run(_run(args))
    except ConfigError as error:
        key = error.path.removeprefix("$.models[0].")
        if key == error.path:
            raise
        flag = "--" + re.sub("[A-Z]", lambda letter: f"-{letter[0].lower()}", key)
        raise ConfigError(flag, error.message.removesuffix(f" {DOWNLOADS}")) from error


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
            key = engine_key(args)
            session = await stack.enter_async_context(client_session(lambda _: key))
            comparison = await _comparison(
                args.compare, EngineApi(session, _TIMEOUT_SECONDS), RemoteTokenizer(session, rests=False)
            )
        for line in json_lines.read(args.file):
            json_lines.write(await _answered(line, args.path, tokenizers, comparison))
    return 0 if comparison is None else comparison.report()


async def _answered(
    line: bytes, path: str | None, tokenizers: TokenizerManager, comparison: _Comparison | None
) -> dict[str, object]:
    try:
        prompt = _prompt(line, path)
    except InvalidRequest as error:
        return {"error": str(error)}
    try:
        engines = () if comparison is None else (comparison.engine,)
        answer = _answer(await tokenizers.tokenize(prompt, model=_MODEL, engines=engines))
    except TokenizeError as error:
        answer = {"error": str(error)}
    return answer if comparison is None else answer | await comparison.compare(prompt, answer)


def _prompt(line: bytes, path: str | None) -> Prompt:
    """The prompt of a request body, whatever model it names. Raises `InvalidRequest`."""
    body = fields.decode(_BODY, line)
    if path is None:
        path = next((path for key, path in _PATHS.items() if key in body), None)
    if path is None:
        raise InvalidRequest(
            f"expected one of {', '.join(f'`{key}`' for key in _PATHS)} in the body; otherwise name its API with --path"
        )
    body.setdefault("model", msgspec.Raw(msgspec.json.encode(_MODEL)))
    return parse(path, msgspec.json.encode(body))


def _answer(tokenized: Tokenized) -> dict[str, object]:
    tokens = tokenized.tokens
    return {"tokens": tokens.ids.tolist()} | ({} if tokens.complete else {"complete": False})


@dataclass(frozen=True)
class _ComparedEngine:
    url: str
    engine: str | None
    version: str | None

    def index_name(self, _: str) -> str | None:
        """None: the engine is asked for its model by the name that it reports."""
        return None


async def _comparison(url: str, api: EngineApi, remote: RemoteTokenizer) -> _Comparison:
    """Raises `ConfigError` when the engine does not say which model it serves."""
    try:
        served = await api.models(url.rstrip("/"))
        facts = (await api.about(url.rstrip("/"), None if served is None else served.engine)).facts
    except (EngineDown, OutOfResources) as error:
        raise ConfigError("--compare", str(error)) from error
    if served is None:
        raise ConfigError("--compare", f"expected a model in {url}/v1/models, found none")
    engine = _ComparedEngine(url, facts.kind if facts else served.engine, facts.version if facts else None)
    return _Comparison(remote, engine, served.base_model)


class _Comparison:
    """Compares token ids with an engine's and counts the outcomes."""

    def __init__(self, remote: RemoteTokenizer, engine: _ComparedEngine, model: str) -> None:
        self._remote = remote
        self.engine = engine
        self._model = model
        self._same = self._different = self._engine_only = self._failed = 0

    async def compare(self, prompt: Prompt, answer: dict[str, Any]) -> dict[str, object]:
        """The fields to add to our answer."""
        if prompt.token_ids is not None or prompt.inexact is not None or not answer.get("complete", True):
            return {}
        self._progress()
        try:
            ids = await self._remote.tokenize(prompt, [self.engine], self._model, timeout_seconds=_TIMEOUT_SECONDS)
        except TokenizeError as error:
            self._failed += 1
            return {"engine_error": str(error)}
        theirs, ours = ids.tolist(), answer.get("tokens")
        if prompt.keep_last is not None:
            theirs = theirs[-prompt.keep_last :]
        if prompt.keep_first is not None:
            theirs = theirs[: prompt.keep_first]
        if ours is None:
            self._engine_only += 1
            return {"engine_tokens": theirs}
        self._same += theirs == ours
        self._different += theirs != ours
        if theirs == ours:
            return {}
        return {"first_difference": first_difference(ours, theirs), "engine_tokens": theirs}

    def report(self) -> int:
        """Print the counts and return the exit code."""
        print(
            f"compared with the engine: {self._same} equal, {self._different} different, "
            f"{self._engine_only} tokenized only by the engine, {self._failed} not tokenized by the engine",
            file=sys.stderr,
        )
        if self._different:
            return 1
        return 0 if self._same else 3

    def _progress(self) -> None:
        done = self._same + self._different + self._engine_only + self._failed
        if sys.stderr.isatty() and done % _PROGRESS_LINES == 0:
            print(f"\r{done} compared, {self._different} different ", end="", file=sys.stderr, flush=True)
