"""`matrixinfer init`: writes a config file for engines that are running."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from urllib.parse import urlsplit

from matrixinfer.app.init_config import Found, ask, config_text
from matrixinfer.cli.arguments import Subparsers, duration
from matrixinfer.cli.terminal import own_name
from matrixinfer.config import parse, split_address
from matrixinfer.errors import ConfigError
from matrixinfer.pods.engine_api import EngineDown, OutOfResources
from matrixinfer.pods.session import client_session


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "init",
        help="write a config file for engines that are running",
        description="Ask engines what they are, and write a config file with comments. `config check` accepts it, and "
        "`serve --config` starts a gateway with it. Exit code 2 if an engine does not answer: nothing is written then.",
    )
    parser.add_argument("urls", nargs="+", metavar="URL", help="base URLs of the engines, without `/v1`")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there (default: standard output)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--admin", default="127.0.0.1:8081", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--patience",
        type=duration,
        default=5.0,
        metavar="S",
        help="seconds to wait for an answer (default: %(default)g)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file. Raises `ConfigError`."""
    if args.output is not None and args.output.exists() and not args.force:
        raise ConfigError("--output", f"{args.output} exists already; use --force to replace it")
    for flag, address in (("--listen", args.listen), ("--admin", args.admin)):
        split_address(address, path=flag)
    urls = list(dict.fromkeys(_base(url) for url in args.urls))
    text = config_text(asyncio.run(_ask_all(urls, args.patience)), listen=args.listen, admin=args.admin)
    parse(text, base=Path())  # an engine that says something strange must not lead to a file that `serve` refuses
    if args.output is None:
        sys.stdout.write(text)
    else:
        args.output.write_text(text, encoding="utf-8")
        print(f"{args.output}: written; check it with: {own_name()} config check {args.output}", file=sys.stderr)
    return 0


def _base(url: str) -> str:
    bare = url.rstrip("/").removesuffix("/v1")
    if urlsplit(bare).scheme not in ("http", "https") or not urlsplit(bare).netloc:
        raise ConfigError("URL", f"expected `http://host:port`, got `{url}`")
    return bare


async def _ask_all(urls: list[str], seconds: float) -> list[Found]:
    async with client_session() as session:
        answers = await asyncio.gather(*(ask(session, url, seconds) for url in urls), return_exceptions=True)
    found: list[Found] = []
    failures: list[str] = []
    for answer in answers:
        if isinstance(answer, EngineDown | OutOfResources):
            failures.append(str(answer))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found.append(answer)
    if failures:
        raise ConfigError("URL", f"no answer: {'; '.join(failures)}. Start these engines, or leave them out")
    return found
