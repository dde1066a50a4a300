"""`matrixinfer keys`: makes API keys for the gateway's clients."""

from __future__ import annotations

import argparse
import json
import sys

from matrixinfer.access.key_file import hash_of, new_key
from matrixinfer.cli.arguments import Subparsers
from matrixinfer.errors import ConfigError


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    keys = subparsers.add_parser("keys", help="make API keys for the gateway's clients")
    commands = keys.add_subparsers(title="commands", required=True, metavar="COMMAND")
    create = commands.add_parser(
        "create",
        help="make a new key",
        description="Print a new key on standard error, once, and its entry for the file of keys "
        "(`access.keysFile`) on standard output, so that `>> keys.yaml` adds it there. The file has the key's hash "
        "only, so give the key to its holder now.",
    )
    create.add_argument("--name", required=True, help="name of the key, in metrics and logs")
    create.add_argument("--tenant", help="tenant that its holder belongs to (default: the name)")
    create.add_argument("--json", action="store_true", help="print key and entry as one JSON object")
    create.set_defaults(run=run_create)
    hashed = commands.add_parser(
        "hash",
        help="print the hash of a key that exists",
        description="Read a key from standard input and print its hash for the file of keys. A key must be long and "
        "random: the hash of a word can be guessed.",
    )
    hashed.set_defaults(run=run_hash)


def run_create(args: argparse.Namespace) -> int:
    """Make a key."""
    key = new_key()
    entry = {"name": args.name, "hash": hash_of(key)} | ({} if args.tenant is None else {"tenant": args.tenant})
    if args.json:
        print(json.dumps({"key": key, "entry": entry}))
        return 0
    print(key, file=sys.stderr)
    print(f"  - {json.dumps(entry, ensure_ascii=False)}")
    return 0


def run_hash(_: argparse.Namespace) -> int:
    """Hash a key. Raises `ConfigError`."""
    key = sys.stdin.read().strip()
    if not key or not key.isascii() or any(character.isspace() for character in key):
        raise ConfigError("KEY", "expected one line of ASCII without spaces on standard input")
    print(hash_of(key))
    return 0
