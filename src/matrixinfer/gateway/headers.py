"""Which headers pass through, and the ids of requests and sessions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from multidict import CIMultiDict, MultiMapping

REQUEST_ID = "x-request-id"
POD = "x-matrixinfer-pod"
SERVER = "matrixinfer"
"""Answers that name no server say this, and no version."""
SESSIONS = (
    "x-session-id",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "x-session-affinity",
    "x-dynamo-session-id",
    "x-litellm-session-id",
)
"""What clients name a session by, in the order in which they are believed: plain clients, Claude Code, Codex (two
spellings), OpenCode, and clients of other routers."""
AGENT = "x-claude-code-agent-id"
"""A sub-agent of the session, whose conversation is another one."""
RANK = "x-data-parallel-rank"

_HOP_BY_HOP = (
    "connection",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
)
"""Headers that belong to one connection (RFC 9110, 7.6.1)."""

_FRAMING = {"content-length"}
"""Headers that stay even if `Connection` names them, which is not allowed: without them the body has no end."""

_REPLACED = frozenset((*_HOP_BY_HOP, "content-length", "expect", "host", REQUEST_ID, RANK))
_DROPPED = frozenset((*_HOP_BY_HOP, "proxy-authenticate"))
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MAX_SESSION_CHARS = 256


def request_id(headers: Mapping[str, str]) -> str:
    """The client's request id if it is short and printable, otherwise a new one."""
    given = headers.get(REQUEST_ID)
    return given if given is not None and _ID.fullmatch(given) else os.urandom(16).hex()


def session_id(headers: Mapping[str, str]) -> str | None:
    """What the client calls the conversation, if it sends a name of sane length."""
    for name in SESSIONS:
        given = headers.get(name)
        if given:
            break
    else:
        return None
    agent = headers.get(AGENT)
    if agent:
        given = f"{given}/{agent}"
    return given if len(given) <= _MAX_SESSION_CHARS else None


def to_pod(headers: MultiMapping[str], identity: str, rank: int | None) -> CIMultiDict[str]:
    """A client's headers as a pod gets them; host and length are added when they are sent.

    `rank` is the chosen data-parallel rank, as the engine's API counts; None if the pod has only one cache. vLLM takes
    the header, and so does SGLang for chats and completions.
    """
    kept = _without(headers, _REPLACED)
    kept[REQUEST_ID] = identity
    if rank is not None:
        kept[RANK] = str(rank)
    return kept


def to_client(headers: MultiMapping[str], identity: str, pod: str) -> CIMultiDict[str]:
    """A pod's response headers as the client gets them."""
    kept = _without(headers, _DROPPED)
    kept[REQUEST_ID] = identity
    kept[POD] = pod
    kept.setdefault("server", SERVER)
    return kept


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds in a pod's `Retry-After`, which may also be a date (RFC 9110, 10.2.3); None without a valid one."""
    given = headers.get("retry-after", "").strip()
    if not given:
        return None
    if given.isascii() and given.isdigit():
        return float(given[:9])
    try:
        until = parsedate_to_datetime(given)
    except ValueError:
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _without(headers: MultiMapping[str], names: frozenset[str]) -> CIMultiDict[str]:
    for connection in headers.getall("connection", ()):
        names = names.union({name.strip().lower() for name in connection.split(",")} - _FRAMING)
    kept = CIMultiDict(headers)
    for name in names:
        if name in kept:
            del kept[name]
    return kept
