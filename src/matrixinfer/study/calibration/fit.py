"""From measured times to the terms of a step's duration. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
import numpy.typing as npt

from matrixinfer.errors import MatrixInferError
from matrixinfer.study.presets import Times

_ALIKE = 256
"""Contexts are alike that differ by fewer tokens per request."""
FEWEST_LENGTHS = 3
"""Different prompt lengths that a fit needs; and batches of 1 and of more."""


class CalibrationError(MatrixInferError):
    """An engine cannot be calibrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One prompt at an idle engine."""

    tokens: int
    seconds: float
    """Until the first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Requests that all generate at the same time."""

    batch: int
    context: int
    """Tokens before the ones that are generated, over all requests."""
    seconds: float
    """Between two tokens of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The terms, and how well they explain what was measured."""

    times: Times
    overhead: float
    """Seconds of a request outside of steps: network, HTTP, tokenizing."""
    typical_error: float
    """Half of the measurements are predicted within this share."""
    worst_error: float


def fit(prefills: Sequence[Prefill], decodes: Sequence[Decode], *, max_tokens: int) -> Fit:
    """Fit the terms; each is at least 0. `max_tokens` is the engine's limit per step. Raises `CalibrationError`."""
    first = _by_length(prefills)
    batches = {each.batch for each in decodes}
    if len(first) < FEWEST_LENGTHS or 1 not in batches or len(batches) < 2:
        raise CalibrationError(
            f"too little was measured: expected {FEWEST_LENGTHS} lengths of prompts, one request alone and several together; "
            "found " + f"{len(first)} lengths and batches of {', '.join(map(str, sorted(batches))) or 'none'}"
        )
    paces = _by_batch(decodes)
    rows = [[1.0, each.batch, each.context] for each in paces]
    step, sequence, context = _solve(rows, [each.seconds for each in paces])
    steps = [-(-tokens // max_tokens) for tokens, _ in first]
    rows = [[1.0, tokens, tokens * tokens / 2] for tokens, _ in first]
    rest = [max(1e-6, seconds - step * count) for (_, seconds), count in zip(first, steps, strict=True)]
    overhead, token, pair = _solve(rows, rest)
    times = Times(
        step=_rounded(step),
        prefill_token=_rounded(token),
        decode_sequence=_rounded(sequence),
        attention_pair=_rounded(pair),
        decode_context=_rounded(max(0.0, context - pair)),
    )
    errors = sorted(
        chain(
            (
                abs(overhead + count * step + token * tokens + pair * tokens * tokens / 2 - seconds) / seconds
                for (tokens, seconds), count in zip(first, steps, strict=True)
            ),
            (
                abs(step + sequence * each.batch + context * each.context - each.seconds) / each.seconds
                for each in paces
            ),
        )
    )
    return Fit(times=times, overhead=overhead, typical_error=errors[len(errors) // 2], worst_error=errors[-1])


def _by_batch(decodes: Sequence[Decode]) -> list[Decode]:
    """The faster half of the measurements of each batch and context, for the same reason as below."""
    alike: dict[tuple[int, int], list[Decode]] = {}
    for each in decodes:
        alike.setdefault((each.batch, round(each.context / each.batch / _ALIKE)), []).append(each)
    return [
        each for group in alike.values() for each in sorted(group, key=lambda each: each.seconds)[: -(-len(group) // 2)]
    ]


def _by_length(prefills: Sequence[Prefill]) -> list[tuple[int, float]]:
    """The lower quartile of each length: what disturbs a measurement only makes it longer."""
    seconds: dict[int, list[float]] = {}
    for each in prefills:
        seconds.setdefault(each.tokens, []).append(each.seconds)
    return [(tokens, sorted(values)[(len(values) - 1) // 4]) for tokens, values in sorted(seconds.items())]


def _solve(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Least squares of relative errors with terms of at least 0: the best of all sets of terms that can be left out."""
    weights = 1 / np.array(values)
    matrix = np.array(rows) * weights[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    best: npt.NDArray[np.float64] = np.zeros(matrix.shape[1])
    least = float("inf")
    for count in range(1, matrix.shape[1] + 1):
        for kept in combinations(range(matrix.shape[1]), count):
            columns = list(kept)
            found, *_ = np.linalg.lstsq(matrix[:, columns] / scale[columns], np.ones(len(values)), rcond=None)
            if (found < 0).any():
                continue
            error = float(((matrix[:, columns] / scale[columns] @ found - 1) ** 2).sum())
            if error < least * (1 - 1e-9):
                least = error
                best = np.zeros(matrix.shape[1])
                best[columns] = found / scale[columns]
    return [float(value) for value in best]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
