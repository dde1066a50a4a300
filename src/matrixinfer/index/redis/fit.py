"""Finds how the blocks of prompts are hashed in Redis, by trying: for writers of other projects, which do not say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from matrixinfer.blocks import Scheme, TokenBlockProcessor
from matrixinfer.errors import IndexUnavailable
from matrixinfer.index.redis import layout, scan
from matrixinfer.index.redis.store import Store

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Block sizes that are tried besides those of the gateway and the engines."""
HEAD_TOKENS = 2 * max(SIZES)
"""Tokens of a prompt that are needed: two blocks."""
MAX_KEYS = 20_000
"""Keys that are scanned for the models in Redis."""
MAX_MODELS = 8
"""Other models whose keys are tried."""
MAX_SHOWN = 3
"""Names in a message."""
_SCHEMES: tuple[Scheme, ...] = ("block", "prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What Redis has of the prompts of one model. The model's names are those in Redis."""

    model: str
    prompts: int
    """Number of prompts that were looked for."""
    models: Mapping[str, int] = field(default_factory=dict)
    """Number of block keys by model, as far as they were scanned."""
    scanned_all: bool = False
    found_as: str | None = None
    """The model under whose name the first blocks were found; None if none was found."""
    size: int | None = None
    """Their block size."""
    scheme: Scheme | None = None
    """How they are hashed; None if that cannot be told."""
    holders: Sequence[str] = ()
    """The pods that hold the first blocks."""

    @property
    def keys(self) -> int:
        """Number of block keys of any model."""
        return sum(self.models.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why lookups of a model do not match, and what to do about it."""

    model: str
    keys: int
    message: str
    fix: str


async def find(
    store: Store, model: str, prompts: Sequence[bytes], here: TokenBlockProcessor, sizes: Collection[int]
) -> Fit:
    """Look for the blocks of `prompts` (`blocks.token_bytes`) under every scheme, block size and model name.

    Raises `IndexUnavailable`.
    """
    models, scanned_all = await _models(store)
    others = [name for name, _ in Counter(models).most_common(MAX_MODELS + 1) if name != model][:MAX_MODELS]
    tried = sorted({*SIZES, *sizes, here.block_size}, key=lambda size: (size != here.block_size, -size))
    fit = Fit(model=model, prompts=len(prompts), models=models, scanned_all=scanned_all)
    for name, size in product((model, *others), tried):
        blocks = TokenBlockProcessor(size, "block")
        first = {hashes[0]: prompt for prompt in prompts if (hashes := blocks.hashes(prompt[: size * 4]))}
        holders = await _holders(store, name, list(first))
        if any(holders.values()):
            found = [first[block] for block, pods in holders.items() if pods]
            return Fit(
                model=model,
                prompts=len(prompts),
                models=models,
                scanned_all=scanned_all,
                found_as=name,
                size=size,
                scheme=await _scheme(store, name, size, found, here),
                holders=sorted(set().union(*holders.values())),
            )
    return fit


async def _models(store: Store) -> tuple[dict[str, int], bool]:
    """The number of block keys by model, of the first keys; nothing if this user may not scan them."""
    counts: Counter[str] = Counter()
    looked_at = 0
    try:
        async for keys in scan.key_pages(store):
            names = (layout.block_of(key.decode("utf-8", "replace")) for key in keys)
            counts.update(name[0] for name in names if name is not None)
            looked_at += scan.PAGE
            if looked_at >= MAX_KEYS:
                return dict(counts), False
    except IndexUnavailable:
        return dict(counts), False
    return dict(counts), True


async def _scheme(
    store: Store, model: str, size: int, prompts: Sequence[bytes], here: TokenBlockProcessor
) -> Scheme | None:
    """The scheme by which the second blocks of some prompts are there: the first ones have the same hash in all."""
    for scheme in sorted(_SCHEMES, key=lambda scheme: scheme != here.scheme):
        blocks = TokenBlockProcessor(size, scheme)
        second = [hashes[1] for prompt in prompts if len(hashes := blocks.hashes(prompt[: 2 * size * 4])) > 1]
        if any((await _holders(store, model, second)).values()):
            return scheme
    return None


async def _holders(store: Store, model: str, hashes: Sequence[int]) -> dict[int, set[str]]:
    if not hashes:
        return {}
    keys = [f"{layout.prefix_of(model)}{block}".encode() for block in hashes]
    return {block.hash: set(block.stamps) for block in await scan.fetch(store, keys)}


def problem(
    fit: Fit, here: TokenBlockProcessor, knows: Callable[[str], bool], endpoints: Collection[str]
) -> tuple[str, str] | None:
    """Why the blocks of a model do not match, and what to do; None if they do, or would."""
    if fit.found_as is None:
        return _nothing(fit)
    differs = list(_differences(fit, here))
    if differs:
        return "; ".join(text for text, _ in differs), "; ".join(fix for _, fix in differs)
    return unknown_names(fit.holders, knows, sorted(endpoints))


def unknown_names(
    holders: Sequence[str], knows: Callable[[str], bool], endpoints: Sequence[str]
) -> tuple[str, str] | None:
    """Why holders of blocks are no pods here, and what to do; None if one of them is, or if there are none."""
    if not holders or any(map(knows, holders)):
        return None
    return (
        f"the pods in Redis are named {_some(holders)}, and here {_some(endpoints)}",
        "give each pod in `pods` the `name` that its writer gives it",
    )


def _differences(fit: Fit, here: TokenBlockProcessor) -> Iterator[tuple[str, str]]:
    scheme = fit.scheme or here.scheme
    if (fit.size, scheme) != (here.block_size, here.scheme):
        known = f"scheme {fit.scheme}, size {fit.size}" if fit.scheme else f"size {fit.size}"
        yield (
            f"keys hash like {known}, and here scheme {here.scheme}, size {here.block_size}",
            f"set `blocks: {{scheme: {scheme}, size: {fit.size}}}`",
        )
    if fit.found_as != fit.model:
        yield (
            f"their blocks are in Redis under the model name `{fit.found_as}`",
            f"set `indexName: {fit.found_as}` for the model in `models`, unless that is another model",
        )


def _nothing(fit: Fit) -> tuple[str, str]:
    if fit.scanned_all and not fit.models.get(fit.model):
        there = f"; there are keys of {_some(sorted(fit.models))}" if fit.models else ""
        return (
            f"Redis has no key of the model `{fit.model}`{there}",
            "check that a writer runs for each engine and uses this server, and that it gives the model this name; "
            "set `models[].indexName` if it uses another",
        )
    return (
        "no scheme and block size that were tried fit the keys",
        "check that a writer runs for each engine, and what it hashes: `blocks.scheme` and `blocks.size` must be the same",
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:MAX_SHOWN])
    return f"{shown} and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else shown or "nothing"
