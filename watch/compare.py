"""Compares a release with what the gateway knows of it, and decodes a batch laid out as the release lays it out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from matrixinfer.kvevents.wire import AllBlocksCleared, BlockRemoved, BlockStored, MalformedFrame, decode, tokens_of
from watch.known import Engine, Known, Place
from watch.reader import Module, Struct, parse
from watch.sources import CannotRead, Sources

_BATCH = "KVEventBatch"
_WIRE = "src/matrixinfer/kvevents/wire.py"
_GROUPS = "src/matrixinfer/kvevents/groups.py"
_SAMPLE: Mapping[str, Any] = {
    "block_hashes": [11, 12],
    "parent_block_hash": 10,
    "token_ids": [21, 22, 23, 24],
    "block_size": 2,
    "lora_id": 7,
    "medium": "GPU",
    "lora_name": "adapter",
    "extra_keys": [["adapter"], ["adapter"]],
    "group_idx": 1,
    "kv_cache_spec_kind": "sliding_window",
    "kv_cache_spec_sliding_window": 64,
    "lookahead_token_ids": [[23], [25]],
    "cache_salt": "salt",
}
"""A value of each field that the gateway reads, unlike every other."""


def differences(engine: Engine, sources: Sources) -> list[str]:
    """What the gateway does not know, or relies on and does not find: a sentence each, with what to do."""
    found: list[str] = []
    for part in (_events, _media, _kinds, _strings):
        try:
            found += part(engine, sources)
        except CannotRead as error:
            found.append(f"{engine.title}: {error}")
    return found


def _events(engine: Engine, sources: Sources) -> Iterator[str]:
    module = _module(sources, engine.events)
    structs = module.structs()
    for name, known in engine.structs.items():
        if name in structs:
            yield from _fields(engine, name, structs[name].fields, known)
        else:
            yield (
                f"{engine.title}: {engine.events} has no class {name} any more. "
                f"Find what took its place, then change {_WIRE} and watch/known.py"
            )
    for name in sorted(module.named_in(_BATCH) - engine.structs.keys()):
        yield (
            f"{engine.title}: a batch may hold the new event {name}. Read in {engine.events} what it means, then read it "
            f"in {_WIRE} and name it in watch/known.py"
        )
    if engine.structs.keys() <= structs.keys():
        yield from _layout(engine, structs)
    if (parts := module.sent_parts()) != engine.parts:
        yield (
            f"{engine.title}: messages have {_listed(parts)} parts, and {_listed(engine.parts)} were expected. "
            "Compare how live and replayed frames are sent with src/matrixinfer/kvevents/replay.py"
        )


def _media(engine: Engine, sources: Sources) -> Iterator[str]:
    return _names(engine, sources, engine.media_in, engine.media, "medium", "src/matrixinfer/kvevents/tiers.py")


def _kinds(engine: Engine, sources: Sources) -> Iterator[str]:
    if engine.kinds is not None and engine.kinds_in is not None:
        yield from _names(engine, sources, engine.kinds_in, engine.kinds, "kind of attention", _GROUPS)


def _fields(engine: Engine, name: str, found: Collection[str], known: Known) -> Iterator[str]:
    for field in sorted({*found} - known.all):
        yield (
            f"{engine.title}: {name} has a new field `{field}`. Read in {engine.events} what it means. Does the content "
            f"of a block, or where it is, depend on it? Then read it in {_WIRE}; if not, say why in watch/known.py"
        )
    for field in sorted(known.all - {*found}):
        yield (
            f"{engine.title}: {name} has no field `{field}` any more. Find out what replaces it in {engine.events}, "
            f"then change {_WIRE} and watch/known.py"
        )


def _layout(engine: Engine, structs: Mapping[str, Struct]) -> Iterator[str]:
    """Decode a batch of one event of each kind, laid out as the structs say."""
    names = [name for name in engine.structs if name != _BATCH]
    events = [_encoded(structs[name]) for name in names]
    values = {"ts": 1.0, "events": events, "data_parallel_rank": 3, "attn_dp_rank": 3}
    fields = [(field, values.get(field)) for field in structs[_BATCH].fields]
    batch = [value for _, value in fields] if structs[_BATCH].is_array else dict(fields)
    advice = f"Compare the layout in {engine.events} with the layouts in {_WIRE}, and add it there"
    try:
        decoded = decode(msgspec.msgpack.encode(batch))
    except MalformedFrame as error:
        yield f"{engine.title}: a batch has a layout that the gateway cannot read ({error}). {advice}"
        return
    if decoded.unreadable:
        yield f"{engine.title}: {decoded.unreadable} of {len(names)} kinds of events cannot be read. {advice}"
        return
    if decoded.rank != 3:
        yield f"{engine.title}: the rank of a batch cannot be read. {advice}"
    for name, event in zip(names, decoded.events, strict=True):
        yield from (
            f"{engine.title}: `{field}` of {name} is not read where the release puts it. {advice}"
            for field in engine.structs[name].read
            if field in structs[name].fields and _value(event, field) != _SAMPLE[field]
        )


def _encoded(struct: Struct) -> list[Any] | dict[str, Any]:
    values = {field: _SAMPLE.get(field) for field in struct.fields}
    if struct.is_array:
        return [*([struct.tag] if struct.tag else ()), *values.values()]
    return {struct.tag_field: struct.tag, **values} if struct.tag_field else values


def _value(event: BlockStored | BlockRemoved | AllBlocksCleared, field: str) -> Any:
    if field == "token_ids" and isinstance(event, BlockStored):
        packed = tokens_of(event)
        return packed and [int.from_bytes(packed[at : at + 4], "big") for at in range(0, len(packed), 4)]
    return getattr(event, field, None)


def _names(engine: Engine, sources: Sources, place: Place, known: Known, what: str, file: str) -> Iterator[str]:
    module = _module(sources, place.path)
    found = module.values(place.name) if place.is_enum else module.constants(place.name)
    if not found:
        yield (
            f"{engine.title}: {place.path} has no {place.name} any more. "
            f"Find where each {what} is named now, and change watch/known.py"
        )
        return
    for name in sorted({*found} - known.all):
        yield (
            f"{engine.title}: there is a new {what}, `{name}`. Read in {place.path} what it means, then give it a rule in "
            f"{file}; if it needs none, say why in watch/known.py"
        )
    for name in sorted(known.all - {*found}):
        yield (
            f"{engine.title}: the {what} `{name}` is gone from {place.path}. "
            f"If it has another name now, add that to {file}; in any case change watch/known.py"
        )


def _strings(engine: Engine, sources: Sources) -> Iterator[str]:
    for path, wanted in engine.strings.items():
        found = _module(sources, path).words()
        for word in wanted:
            if word not in found:
                yield (
                    f"{engine.title}: `{word}` is not in {path} any more, and the gateway looks for it over HTTP. "
                    "Find its new name, read that too in src/matrixinfer/pods, and change watch/known.py"
                )


def _module(sources: Sources, path: str) -> Module:
    text = sources.text(path)
    if text is None:
        raise CannotRead(f"there is no {path} any more. Find where its content went, and change watch/known.py")
    return parse(path, text)


def _listed(numbers: Collection[int]) -> str:
    return " or ".join(map(str, sorted(numbers))) or "no known number of"
