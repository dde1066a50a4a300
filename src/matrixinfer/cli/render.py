"""`matrixinfer render`: what a chat template makes of conversations."""

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
    """The arguments of `apply_chat_template` in transformers; `kwargs` are its further ones."""

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
        help="what a chat template makes of conversations",
        description="Read JSON lines {messages, tools, documents, add_generation_prompt, continue_final_message, kwargs} "
        'and write {"rendered": …} or {"error": …} for each, as transformers renders them. Messages reach the template '
        "as they are, without what an engine does to them before.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the lines; standard input without it")
    parser.add_argument(
        "--chat-template", required=True, metavar="TEMPLATE", help="a Jinja file, or `chatml` for the built-in one"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="a model's folder, for special tokens such as bos_token"
    )
    parser.add_argument(
        "--now", type=datetime.fromisoformat, metavar="TIME", help="the time that templates are told, in ISO 8601"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer every line. Raises `ConfigError` and `TokenizeError` when there is no template to render with."""
    template = _template(args)
    for line in json_lines.read(args.file):
        try:
            json_lines.write({"rendered": _rendered(template, line)})
        except MatrixInferError as error:
            json_lines.write({"error": str(error)})
    return 0


def _template(args: argparse.Namespace) -> ChatTemplate:
    source = CHATML
    if args.chat_template != "chatml":
        source = tokenizer_files.read_text(Path(args.chat_template), where="--chat-template")
    special = {} if args.tokenizer is None else tokenizer_files.special_tokens(args.tokenizer, where="--tokenizer")
    now = datetime.now if args.now is None else lambda: args.now
    return ChatTemplate(source, now=now, **special)


def _rendered(template: ChatTemplate, line: bytes) -> str:
    chat = fields.decode(_CONVERSATION, line)
    arguments: dict[str, Any] = {
        "documents": chat.documents,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
    }
    twice = {"messages", "tools"} & chat.kwargs.keys()
    if twice:
        raise InvalidRequest(f"`kwargs` names `{min(twice)}`, which the line has itself")
    return template.render(chat.messages, chat.tools, **arguments | chat.kwargs)
