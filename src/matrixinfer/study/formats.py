"""Reads traces that others publish, into turns."""

from __future__ import annotations

import csv
import gzip
from array import array
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from matrixinfer.errors import MatrixInferError
from matrixinfer.study.trace import Alphabet, Trace, Turn, filled

_LENGTHS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_NO_IDS = np.zeros(0, np.uint32)


class TraceError(MatrixInferError):
    """A trace cannot be read."""


class _Hashed(msgspec.Struct):
    """Mooncake's line, and what others add to it."""

    timestamp: float
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: list[int]
    session_id: str | None = None


class _Agents(msgspec.Struct):
    """One coding session: its requests as rows of `columns`, block ids as runs `[first, count]`."""

    id: str
    block_size: int
    columns: list[str]
    requests: list[list[Any]]
    tool_tokens: int = 0
    system_tokens: int = 0


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed with gzip. Raises `TraceError`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield line
    except (OSError, EOFError) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from error


def keys_of(path: Path) -> set[str]:
    """The keys of the first line, by which a format is recognised. Raises `TraceError`."""
    first = next(lines(path), None)
    if first is None:
        raise TraceError(f"the trace {path} is empty")
    try:
        return set(msgspec.json.decode(first, type=dict[str, msgspec.Raw]))
    except msgspec.MsgspecError as error:
        raise TraceError(f"{path}:1: expected a JSON object: {error}") from error


def mooncake(path: Path, *, block_size: int | None = None) -> Trace:
    """Requests with arrival times and hashes of their prompts' blocks. Raises `TraceError`.

    Block ids stand for a block after all before it. Requests of one session also wait for the answer before them. What
    engines generate is new content: the trace does not say what it was. The block size is found from the lengths.
    """
    rows: list[_Hashed] = sorted(_decoded(path, _Hashed), key=lambda row: row.timestamp)
    size = block_size or _block_size(path, rows)
    alphabet, turns = Alphabet(), list[Turn]()
    last: dict[str, int] = {}
    start = rows[0].timestamp if rows else 0.0
    for number, row in enumerate(rows):
        if row.input_length < 1:
            continue
        sent = (row.timestamp - start) / 1000
        known = alphabet.word(row.hash_ids[: row.input_length // size])
        known += alphabet.new(row.input_length // size - len(known))
        reply = max(1, row.output_length)
        session = row.session_id or f"request-{number}"
        after = last.get(session)
        last[session] = len(turns)
        turns.append(
            Turn(
                session=session,
                delay=sent if after is None else 0.0,
                after=after,
                not_before=sent,
                prompt=row.input_length,
                reply=reply,
                letters=filled(known, row.input_length, reply, size, alphabet),
            )
        )
    return Trace(name=name_of(path), block_size=size, turns=turns, settings={"block_size": size})


def lengths(path: Path, *, block_size: int = 16) -> Trace:
    """Requests of which only arrival and lengths are known (Azure's CSV). Every prompt is new. Raises `TraceError`."""
    alphabet, turns = Alphabet(), list[Turn]()
    start: datetime | None = None
    rows = csv.DictReader(line.decode() for line in lines(path))
    for number, row in enumerate(rows, start=2):
        try:
            sent = datetime.fromisoformat(row["TIMESTAMP"])
            prompt, reply = int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}:{number}: expected {', '.join(_LENGTHS)}: {error!r}") from error
        start = start or sent
        if prompt < 1:
            continue
        turns.append(
            Turn(
                session=f"request-{number - 2}",
                delay=max(0.0, (sent - start).total_seconds()),
                prompt=prompt,
                reply=reply,
                letters=filled((), prompt, reply, block_size, alphabet),
            )
        )
    return Trace(name=name_of(path), block_size=block_size, turns=turns, settings={"block_size": block_size})


def _block_size(path: Path, rows: Sequence[_Hashed]) -> int:
    """Tokens per block id, where the last id may be of a block that is not full."""
    some = [row for row in rows[:1000] if row.hash_ids and row.input_length > 0]
    for size in (16, 32, 64, 128, 256, 512, 1024, 2048):
        if all(row.input_length // size <= len(row.hash_ids) <= -(-row.input_length // size) for row in some):
            return size
    raise TraceError(f"{path}: no block size fits the numbers of tokens and of block ids; name it with --block-tokens")


def agents(
    path: Path,
    *,
    block_size: int = 256,
    max_think: float = 60.0,
    start_interval: float = 30.0,
    most_sessions: int | None = None,
) -> Trace:
    """Coding-agent sessions, each a main agent with sub-agents.

    A session begins `start_interval` seconds after the one before it. A request is sent when the last request that had
    ended before it in the recording has its answer, after the time that then passed, at most `max_think` seconds. Blocks
    are read in groups of `block_size` tokens. The tools and the system prompt are the same in all sessions with as many
    tokens of them. Only the first `most_sessions` are read. A reply is what the same agent's next prompt continues with.
    """
    alphabet = Alphabet()
    turns: list[Turn] = []
    for number, row in enumerate(islice(_decoded(path, _Agents), most_sessions)):
        try:
            _Session(row, number, block_size, max_think, number * start_interval, alphabet).read(turns)
        except OverflowError as error:
            raise TraceError(f"{path}: session {row.id}: {error}") from error
    settings = {
        "block_size": block_size,
        "max_think_s": max_think,
        "session_interval_s": start_interval,
        "most_sessions": most_sessions,
    }
    return Trace(name=name_of(path), block_size=block_size, turns=turns, settings=settings)


class _Session:
    """Turns the requests of one session into turns."""

    def __init__(
        self, row: _Agents, number: int, block_size: int, max_think: float, start: float, alphabet: Alphabet
    ) -> None:
        if "hash_rle" not in row.columns:
            raise TraceError(f"session {row.id}: expected a column `hash_rle`, found {row.columns}")
        if row.block_size < 1 or block_size % row.block_size:
            raise TraceError(f"session {row.id}: expected blocks of a multiple of {row.block_size} tokens")
        self._row = row
        self._number = number
        self._block_size = block_size
        self._group = block_size // row.block_size
        self._max_think = max_think
        self._start = start
        self._alphabet = alphabet
        self._base = alphabet.reserve(_most(row))
        self._common = (row.tool_tokens + row.system_tokens) // block_size

    def read(self, turns: list[Turn]) -> None:
        """Append the session's turns."""
        at = {name: position for position, name in enumerate(self._row.columns)}
        try:
            rows = [
                (float(row[at["t"]]), str(row[at["agent"]]), int(row[at["in"]]), int(row[at["out"]]),
                 float(row[at["api_time"]] or 0), self._letters(row[at["hash_rle"]], str(row[at["agent"]]), int(row[at["in"]])))
                for row in self._row.requests
            ]  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TraceError(f"session {self._row.id}: expected rows of {self._row.columns}: {error!r}") from error
        rows = sorted((row for row in rows if row[2] > 0), key=lambda row: row[0])
        ends: list[tuple[float, int]] = []  # when each request ended, and its position
        first = len(turns)
        for number, (sent, agent, prompt, reply, seconds, letters) in enumerate(rows):
            before = max((end for end in ends if end[0] <= sent), default=None)
            delay = self._start + sent if before is None else min(sent - before[0], self._max_think)
            later = next((row for row in rows[number + 1 :] if row[1] == agent), None)
            continued = letters
            if later is not None and later[5][: len(letters)] == letters:
                continued = later[5]
            turns.append(
                Turn(
                    session=self._row.id,
                    delay=delay,
                    after=None if before is None else before[1],
                    prompt=prompt,
                    reply=max(1, reply),
                    letters=filled(continued, prompt, max(1, reply), self._block_size, self._alphabet),
                )
            )
            ends.append((sent + seconds, first + number))

    def _letters(self, runs: Sequence[Sequence[int]], agent: str, prompt: int) -> array[int]:
        """The letters of a prompt's full blocks. An id stands for a block after all before it, so a group's last names it."""
        parts, missing = [_NO_IDS], prompt // self._row.block_size
        for first, count in runs:
            parts.append(np.arange(first, first + min(count, missing), dtype=np.uint32))
            missing -= len(parts[-1])
        ids = np.concatenate(parts)
        last = ids[self._group - 1 :: self._group][: prompt // self._block_size] + np.uint32(self._base)
        word = array("I", last.astype(np.uint32).tobytes())
        if agent == "main":
            shared = (self._row.tool_tokens, self._row.system_tokens)
            for block in range(min(self._common, len(word))):
                word[block] = self._alphabet.letter((*shared, block))
        return word + self._alphabet.new(prompt // self._block_size - len(word))


def _most(row: _Agents) -> int:
    """One more than the largest block id of a session."""
    at = row.columns.index("hash_rle")
    try:
        return max((int(first) + int(count) for request in row.requests for first, count in request[at]), default=0)
    except (IndexError, TypeError, ValueError) as error:
        raise TraceError(f"session {row.id}: expected runs [first, count] in `hash_rle`: {error!r}") from error


def _decoded(path: Path, kind: type[Any]) -> Iterator[Any]:
    decoder = msgspec.json.Decoder(kind)
    for number, line in enumerate(lines(path), start=1):
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise TraceError(f"{path}:{number}: {error}") from error


def name_of(path: Path) -> str:
    """The name of a trace: its file's, without suffixes."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".csv")
