"""Downloads of tokenizer files, from a server that answers as the Hub does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt import hub
from tests.waiting import DEADLINE_SECONDS

REPO, SHA = "org/model", "a" * 40
FILES = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"a": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"x",
    "model-00001-of-00002.safetensors": b"weights",
    "pytorch_model.bin": b"weights",
    "README.md": b"words",
}


class Hub:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.hangs = False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.lstrip("/")
        self.asked.append(path)
        if self.hangs:
            await asyncio.sleep(DEADLINE_SECONDS)
        if path.startswith(f"api/models/{REPO}/tree/"):
            return web.json_response(
                [{"type": "file", "path": name, "size": len(data), "oid": "b" * 40} for name, data in FILES.items()]
            )
        if path.startswith(f"api/models/{REPO}"):
            return web.json_response({"id": REPO, "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]})
        name = path.removeprefix(f"{REPO}/resolve/{SHA}/")
        if name not in FILES:
            return web.json_response({"error": "Repository not found"}, status=404)
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": SHA, "Content-Length": str(len(FILES[name]))}
        return web.Response(body=FILES[name] if request.method == "GET" else b"", headers=headers)


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    made = Hub()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.handle)
    async with TestServer(app) as server:
        monkeypatch.setenv("HF_ENDPOINT", str(server.make_url("")).rstrip("/"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield made


async def test_tokenizer_and_templates_are_downloaded_and_no_weights(server: Hub, tmp_path: Path) -> None:
    folder = await hub.download(REPO, None, timeout_seconds=DEADLINE_SECONDS)
    assert folder == tmp_path / "hub" / "models--org--model" / "snapshots" / SHA
    wanted = {name for name in FILES if not name.endswith((".safetensors", ".bin", ".md"))}
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == wanted
    assert not [path for path in server.asked if path.endswith((".safetensors", ".bin"))]


async def test_a_repository_that_does_not_exist_says_so(server: Hub) -> None:
    with pytest.raises(TokenizeError, match="org/other could not be downloaded: "):
        await hub.download("org/other", None, timeout_seconds=DEADLINE_SECONDS)


async def test_a_download_that_hangs_ends_at_its_deadline(server: Hub) -> None:
    server.hangs = True
    began = time.monotonic()
    with pytest.raises(TokenizeError, match=r"could not be downloaded within 0\.5 s"):
        await hub.download(REPO, None, timeout_seconds=0.5)
    assert time.monotonic() - began < DEADLINE_SECONDS / 2
