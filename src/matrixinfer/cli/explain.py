"""`matrixinfer explain`: asks a running gateway why requests went to their pods."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp

from matrixinfer.cli.arguments import Subparsers, at_least_one
from matrixinfer.cli.events.sources import until_stopped
from matrixinfer.cli.follow import LIMIT, follow
from matrixinfer.cli.ladder import print_ladder, since
from matrixinfer.cli.terminal import Rows, Terminal
from matrixinfer.config import CLUSTER_SUFFIX
from matrixinfer.errors import MatrixInferError, client_error
from matrixinfer.feedtools.describe import plural
from matrixinfer.prompt.openai import CHAT_PATH

TIMEOUT_SECONDS = 10.0
COMPLETIONS_HINT = " (--body is taken for a chat; for a body with a `prompt`, add --path /v1/completions)"
Json = Mapping[str, Any]
_WHERE_KNOWN = (
    "running",
    "foreign",
    "metrics_age_s",
    "queue_ms",
    "unseen_tokens",
    "held_tokens",
    "cache_tokens",
    "evicted_tokens_per_second",
    "expected_ms",
)
"""Columns that are shown if they say something about any pod."""
_SHOWN_WITH = {"metrics_age_s": "running"}


class CannotExplain(MatrixInferError):
    """The gateway cannot be reached, or has no such decision."""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "explain",
        help="show why requests went to their pods",
        description="Ask a running gateway for its last decisions, for the decision on one request, or for the decision "
        "that it would make on a request body now. Shows for each pod the matched blocks, trust, load and scores, the "
        "predicted hit, and the hit that the engine reported. With --ladder: why prompt tokens were not found in a cache.",
    )
    parser.add_argument(
        "id", nargs="?", metavar="ID", help="the x-request-id of a response (default: list the last decisions)"
    )
    parser.add_argument(
        "--admin",
        default="http://127.0.0.1:8081",
        metavar="URL",
        help="the gateway's admin address (default: %(default)s)",
    )
    parser.add_argument(
        "--last", type=at_least_one, default=20, metavar="N", help="how many decisions to list (default: %(default)s)"
    )
    parser.add_argument("--pod", metavar="NAME", help="list only decisions for this pod")
    parser.add_argument(
        "--body",
        type=Path,
        metavar="FILE",
        help="show the decision on this request body now, without sending it to a pod; - reads standard input",
    )
    parser.add_argument(
        "--path", default=CHAT_PATH, metavar="PATH", help="the API path that --body is for (default: %(default)s)"
    )
    parser.add_argument(
        "--ladder",
        action="store_true",
        help="show what became of all prompt tokens: seen before, kept, matched, chosen, reused; and how to lose fewer",
    )
    parser.add_argument(
        "--since",
        type=since,
        metavar="TIME",
        help="how far back --ladder looks, such as 15m, 1h or 1d, at most a day (default: 1h)",
    )
    parser.add_argument(
        "--follow", action="store_true", help="print decisions as their answers end, until Ctrl-C; --json: one per line"
    )
    parser.add_argument("--json", action="store_true", help="print the gateway's answer as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask the gateway and print its answer. Raises `CannotExplain`."""
    if args.id is not None and args.body is not None:
        raise CannotExplain("expected the ID of a past request or --body FILE, got both")
    if args.ladder and not (args.id is args.body is args.pod is None):
        raise CannotExplain("--ladder is about all requests: leave ID, --body and --pod out")
    if args.since is not None and not args.ladder:
        raise CannotExplain("--since is only for --ladder")
    if args.follow:
        if args.ladder or not (args.id is args.body is None):
            raise CannotExplain("--follow is about decisions to come: leave ID, --body and --ladder out")
        asyncio.run(_follow(args))
        return 0
    answer = asyncio.run(_ask(args))
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0
    console = Terminal()
    if args.ladder:
        print_ladder(console, answer["ladder"], worker=answer.get("worker", 1), workers=answer.get("workers", 1))
    elif args.body is not None or args.id is not None:
        for number, decision in enumerate([answer] if args.body is not None else answer["decisions"]):
            if number:
                console.print()
            _print_one(console, decision, was_sent=args.body is None)
    elif answer["decisions"]:
        _print_list(console, answer["decisions"])
    else:
        console.print("no decisions yet" if args.pod is None else f"no decisions for the pod {args.pod}")
    return 0


async def _follow(args: argparse.Namespace) -> None:
    """Print decisions until a signal comes."""
    first, args.last = args.last, LIMIT

    async def ask() -> Sequence[Json]:
        answer: Sequence[Json] = (await _ask(args))["decisions"]
        return answer

    async with until_stopped(None):
        await follow(ask, first=first, as_json=args.json)


async def _ask(args: argparse.Namespace) -> Any:
    base = args.admin if "://" in args.admin else f"http://{args.admin}"
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    try:
        async with aiohttp.ClientSession(base.rstrip("/"), timeout=timeout) as session:
            if args.ladder:
                async with session.get("/debug/ladder", params={"since": str(args.since or 3_600)}) as response:
                    return await _answer(response)
            if args.body is not None:
                body = await asyncio.to_thread(_read, args.body)
                async with session.post("/debug/route", params={"path": args.path}, data=body) as response:
                    return await _answer(response, hint=COMPLETIONS_HINT if args.path == CHAT_PATH else "")
            pod = None if args.pod is None else args.pod.removesuffix(CLUSTER_SUFFIX)
            query = {"limit": str(args.last), "id": args.id, "pod": pod}
            chosen = {key: value for key, value in query.items() if value is not None}
            async with session.get("/debug/decisions", params=chosen) as response:
                answer = await _answer(response)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise CannotExplain(
            f"cannot reach the gateway's admin address {base}: {_reason(error)}. Is the gateway running, "
            "and is --admin the `admin` address of its config?"
        ) from error
    if args.id is not None and not answer["decisions"]:
        raise CannotExplain(
            f"the gateway has no decision on the request `{args.id}`: it keeps only the last ones (scheduler.decisionsKept)"
        )
    return answer


async def _answer(response: aiohttp.ClientResponse, *, hint: str = "") -> Any:
    answer = await response.json(content_type=None)
    if response.status in (403, 404, 405) and not _is_model_unknown(answer):
        raise CannotExplain(
            f"{response.url.origin()} does not answer as the gateway's admin address does (HTTP {response.status}): "
            f"{_message(answer) or 'no reason given'} Is --admin the `admin` address of its config?"
        )
    if response.status != 200:
        message = _message(answer)
        if message and "`messages`" in message:
            message += hint
        raise CannotExplain(message or f"expected status 200 from the gateway, got {response.status}")
    return answer


def _is_model_unknown(answer: Any) -> bool:
    error = answer.get("error") if isinstance(answer, dict) else None
    return isinstance(error, dict) and error.get("code") == "model_not_found"


def _message(answer: Any) -> str | None:
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:  # name resolution has negative ones
        return os.strerror(error.errno).lower()
    return client_error(error)


def _read(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise CannotExplain(f"cannot read {path}: {error.strerror}") from error


def _print_list(console: Terminal, decisions: Sequence[Json]) -> None:
    table = Rows("at", "id", "model", "tokens", "pod", "trust", "predicted_hit_tokens", "cached_tokens", "status")
    for decision in decisions:
        reported = decision["reported"]
        pod = reported["attempts"][-1]  # after a retry another than the chosen one, for which nothing was predicted
        table.add_row(
            _time(decision["at"]),
            decision["id"],
            decision["model"],
            _shown(decision["tokens"]),
            pod,
            decision["pods"].get(pod, {}).get("trust", "-"),
            _shown(_predicted(decision) if pod == decision["chosen"] else None),
            _shown(reported["cached_tokens"]),
            _shown(reported["status"]),
        )
    console.print(table)


def _print_one(console: Terminal, decision: Json, *, was_sent: bool) -> None:
    console.print(f"{decision['id']}  {_time(decision['at'])}  {decision['path']}  {decision['model']}")
    if decision.get("reason"):  # gateways of earlier releases do not say it
        console.print(f"why {decision['chosen']}: {decision['reason']}")
    tokens = "not counted" if decision["tokens"] is None else plural(decision["tokens"], "token")
    console.print(f"prompt: {tokens}, {plural(decision['blocks'], 'full block')}{_estimated(decision)}")
    guessed = decision["guessed_hit_tokens"]
    by_bytes = f", and about {guessed} more by the bytes that were sent there lately" if guessed else ""
    predicted = _predicted(decision)
    known = "unknown" if predicted is None else plural(predicted, "token")
    console.print(f"predicted hit: {known} on {decision['chosen']}{by_bytes}")
    if was_sent:
        console.print(_outcome(decision["reported"]))
    scorers = sorted({scorer for pod in decision["pods"].values() for scorer in pod["scores"]})
    pods = decision["pods"].values()
    used = [field for field in _WHERE_KNOWN if any(pod.get(_SHOWN_WITH.get(field, field)) for pod in pods)]
    is_scaled = any(pod["reuse"] < 1 for pod in decision["pods"].values())
    table = Rows(
        *("pod", "trust", "matched_blocks", "pending_blocks", "recent_blocks"),
        *(("recent_chunks",) if decision["chunks"] else ()),
        *(("reuse",) if is_scaled else ()),
        *("credit", "in_flight", "waiting"),
        *used,
        *(*scorers, "total", ""),
    )
    for name, pod in decision["pods"].items():
        table.add_row(
            name,
            pod["trust"],
            _matched(pod),
            str(pod["pending_blocks"]),
            str(pod["recent_blocks"]),
            *((str(pod["recent_chunks"]),) if decision["chunks"] else ()),
            *((f"{pod['reuse']:g}",) if is_scaled else ()),
            f"{pod['credit']:g}",
            str(pod["in_flight"]),
            _shown(pod["waiting"]),
            *(_shown(pod.get(field)) for field in used),
            *(_shown(pod["scores"].get(scorer)) for scorer in scorers),
            _shown(pod["total"]),
            "chosen" if name == decision["chosen"] else pod["filtered"] or "",
        )
    console.print(table)
    if len(decision["pods"]) < decision["candidates"]:
        console.print(f"… and {decision['candidates'] - len(decision['pods'])} more pods")
    for (trust, words), names in _limits(decision).items():
        console.print(f"{', '.join(names)} ({trust}): {words}")
    for note in decision["notes"]:
        console.print(f"note: {note}")


def _predicted(decision: Json) -> int | None:
    """The predicted hit; None where nothing was predicted, as tokens or the pod's cache are not known."""
    pod = decision["pods"][decision["chosen"]]
    is_known = any(pod[field] for field in ("pending_blocks", "recent_blocks")) or pod["matched_blocks"] is not None
    predicted: int = decision["predicted_hit_tokens"]
    return predicted if decision["tokens"] is not None and is_known else None


def _limits(decision: Json) -> Mapping[tuple[str, str], Sequence[str]]:
    """What the events of pods cannot tell: the pods by their trust and the words. The chosen pod's words come first."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, pod in sorted(decision["pods"].items(), key=lambda each: each[0] != decision["chosen"]):
        for words in pod.get("limits", ()):  # gateways of earlier releases do not report them
            found.setdefault((pod["trust"], words), []).append(name)
    return found


def _estimated(decision: Json) -> str:
    """What is estimated of the prompt, because its token ids do not say it."""
    unknown, others = decision["unknown_tokens"], decision["other_tokens"]
    parts = [
        *(
            [f"about {unknown} tokens with unknown ids ({plural(decision['chunks'], 'chunk')} of bytes)"]
            if unknown
            else []
        ),
        *([f"about {others} tokens in other prompts"] if others else []),
    ]
    return "".join(f", {part}" for part in parts)


def _outcome(reported: Json) -> str:
    as_ids = " with token ids" if reported.get("sent_ids") else ""  # gateways of earlier releases do not say it
    sent = f"sent to {', then '.join(reported['attempts'])}{as_ids}"
    if reported["status"] is None:
        return f"{sent}; no answer"
    if reported["cached_tokens"] is None:
        return f"{sent}; answered {reported['status']}; the engine did not report cached tokens"
    counts = f"{reported['cached_tokens']} of {_shown(reported['prompt_tokens'])} tokens cached"
    return f"{sent}; answered {reported['status']}; the engine reported {counts}"


def _matched(pod: Json) -> str:
    """Matched blocks. If the pod has several cache tiers, the blocks up to each faster tier come first: `8/15`."""
    faster = "".join(f"{count}/" for count in pod["tiers"])
    return faster + _shown(pod["matched_blocks"])


def _time(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%H:%M:%S")


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1f}"
