"""Writes a config file for engines that are running, from what they say about themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from matrixinfer.pods.engine_api import About, EngineApi
from matrixinfer.pods.pod import EngineMetrics, ServedNames


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One engine, as it describes itself."""

    name: str
    url: str
    served: ServedNames | None
    about: About
    metrics: EngineMetrics


async def ask(session: aiohttp.ClientSession, url: str, seconds: float) -> Found:
    """Ask an engine what it is. Raises `EngineDown` and `OutOfResources`."""
    api = EngineApi(session, seconds)
    served = await api.models(url)
    about = await api.about(url, None if served is None else served.engine)
    metrics = await api.metrics(url, now=0.0)
    return Found(name=urlsplit(url).netloc, url=url, served=served, about=about, metrics=metrics)


def config_text(engines: Sequence[Found], *, listen: str, admin: str) -> str:
    """The config file, with comments that say what was found and what can be changed."""
    parts = [
        "# Written by `matrixinfer init`. `matrixinfer config check FILE` checks it, `matrixinfer serve --config FILE`\n"
        "# starts the gateway, and `matrixinfer config reference` lists all keys.",
        f"listen: {json.dumps(listen)}   # the API; 0.0.0.0 serves other machines\n"
        f"admin: {json.dumps(admin)}   # /debug, /admin and /metrics; keep it private",
        "pods:\n" + "\n".join(map(_pod, engines)),
        *_models(engines),
        *_blocks(engines),
        "# discovery:                        # pods that come and go\n"
        "#   files: [{path: pods.yaml}]\n"
        "#   dns: [{name: engines.example, port: 8000}]",
    ]
    return "\n\n".join(parts) + "\n"


def _pod(found: Found) -> str:
    lines = [f"  - name: {json.dumps(found.name)}", f"    url: {json.dumps(found.url)}"]
    lines[1:1] = [f"    # {each}" for each in _remarks(found)]
    sources = found.about.sources
    if sources:
        where = ", ".join(source.endpoint for source in sources)
        lines.append(f"    kvEvents: discover   # it publishes at {_plain(where)}")
    elif sources is not None:
        lines.append(
            "    kvEvents: discover   # it publishes none that it says: start it with --kv-events-config,\n"
            "                         # or give `endpoint` and `replayEndpoint` here"
        )
    return "\n".join(lines)


def _remarks(found: Found) -> list[str]:
    facts, served, metrics = found.about.facts, found.served, found.metrics
    engine = "an engine of an unknown kind" if facts is None else f"{facts.kind} {facts.version or ''}".strip()
    remarks = [_plain(engine)]
    if served is None:
        remarks.append("it does not say which models it serves; it may need an API key")
    else:
        aliases = ", ".join(sorted(served.aliases - {served.base_model}))
        remarks.append(_plain(f"serves {served.base_model}" + (f", also as {aliases}" if aliases else "")))
        if served.adapters:
            remarks.append(_plain(f"adapters: {', '.join(sorted(served.adapters))}"))
    if metrics.block_size is not None:
        size = "" if metrics.cache_tokens is None else f", {metrics.cache_tokens} tokens of cache"
        remarks.append(f"blocks of {metrics.block_size} tokens{size}")
    if metrics.prefix_caching is False:
        remarks.append("its prefix caching is off: no prompt is ever found there")
    return remarks


def _models(engines: Sequence[Found]) -> list[str]:
    """The models whose tokenizer is on this machine."""
    entries: dict[str, str] = {}
    for found in engines:
        root = None if found.served is None else found.served.root
        if found.served is not None and root and Path(root).is_absolute() and Path(root, "tokenizer.json").is_file():
            entries[found.served.base_model] = root
    if not entries:
        served = sorted({found.served.base_model for found in engines if found.served is not None})
        examples = [_plain(json.dumps(name)) for name in served] or ['"the name of the model"']
        return [
            "# models:                           # without an entry, a tokenizer is looked for, else engines tokenize\n"
            + "\n".join(f"#   - {{name: {name}, tokenizer: /models/its-folder}}" for name in examples)
        ]
    lines = [
        f"  - name: {json.dumps(name)}\n    tokenizer: {json.dumps(root)}   # where the engine has it"
        for name, root in entries.items()
    ]
    return ["models:\n" + "\n".join(lines)]


def _blocks(engines: Sequence[Found]) -> list[str]:
    sizes = sorted({found.metrics.block_size for found in engines if found.metrics.block_size})
    words = ", ".join(map(str, sizes)) or "unknown"
    return [f"# blocks: {{size: 128}}               # any size works; the engines' blocks: {words} tokens"]


def _plain(text: str) -> str:
    """`text` without what could end a comment."""
    return "".join(each if each.isprintable() else "?" for each in text)[:300]
