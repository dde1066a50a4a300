"""`matrixinfer render`: renders conversations with a chat template."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from matrixinfer.cli import json_lines
from matrixinfer.cli.arguments import Subparsers
from matrixinfer.errors import InvalidRequest, MatrixInferError
from matrixinfer.prompt import fields, tokenizer_files
from matrixinfer.prompt.chat_template import CHATML, ChatTemplate


class _Conversation(msgspec.Struct, forbid_unknown_fields=True):
    """The arguments of `apply_chat_template` in transformers. `kwargs` holds the ones without a field here."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


_CONVERSATION = msgspec.json.Decoder(_Conversation)


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "render",
        help="render conversations with a chat template",
        description="Read JSON lines {messages, tools, documents, add_generation_prompt, continue_final_message, kwargs} "
        'and write {"rendered": …} or {"error": …} for each, as transformers renders them. The template gets the messages '
        "unchanged: an engine may rewrite them first.",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="file with the lines (default: standard input)"
    )
    parser.add_argument(
        "--chat-template", required=True, metavar="TEMPLATE", help="Jinja file, or `chatml` for the built-in template"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of the model's tokenizer, for special tokens such as bos_token",
    )
    parser.add_argument(
        "--now", type=_time, metavar="TIME", help="the time that the template sees, in ISO 8601 (default: now)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer every line. Raises `ConfigError` or `TokenizeError` when the template cannot be loaded."""
    template = _template(args)
    for line in json_lines.read(args.file):
        try:
            json_lines.write({"rendered": _rendered(template, line)})
        except MatrixInferError as error:
            json_lines.write({"error": str(error)})
    return 0


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a time in ISO 8601, got `{text}`") from None


def _template(args: argparse.Namespace) -> ChatTemplate:
    source = CHATML
    if args.chat_template != "chatml":
        source = tokenizer_files.read_text(Path(args.chat_template), where="--chat-template")
    special = {} if args.tokenizer is None else tokenizer_files.special_tokens(args.tokenizer, where="--tokenizer")
    now = datetime.now if args.now is None else lambda: args.now
    return ChatTemplate(source, now=now, aliases_reasoning=True, **special)


def _rendered(template: ChatTemplate, line: bytes) -> str:
    chat = fields.decode(_CONVERSATION, line)
    arguments: dict[str, Any] = {
        "documents": chat.documents,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
    }
    misplaced = {"messages", "tools"} & chat.kwargs.keys()
    if misplaced:
        raise InvalidRequest(f"expected `{min(misplaced)}` beside `kwargs`, not in it")
    return template.render(chat.messages, chat.tools, **arguments | chat.kwargs)
