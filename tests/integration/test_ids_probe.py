"""What an engine that does not say how it was started is not given."""

from __future__ import annotations

from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from matrixinfer.config import PodConfig
from matrixinfer.pods.engine_kind import EngineFacts
from matrixinfer.pods.pod import Pod
from matrixinfer.prompt.openai import CHAT_PATH
from matrixinfer.trust.sent_ids.probe import IdsProber


@pytest.mark.parametrize("status", [200, 401, 404, 500])
async def test_an_sglang_whose_chat_template_is_unknown_gets_no_ids(status: int) -> None:
    async def answer(_: web.BaseRequest) -> web.Response:
        body = {"chat_template": "llama-2"} if status == 200 else {"detail": "no"}
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_get("/server_info", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        pod = Pod(config=PodConfig(name="a", url=str(server.make_url("")).rstrip("/")))
        pod.facts = EngineFacts(kind="sglang", version="0.5.23")
        prober = IdsProber(session, cast("Any", None), cast("Any", None))  # it does not come to a question
        found = await prober.probe(pod, CHAT_PATH)
    assert found.outcome == ("differs" if status == 200 else "failed")
    assert found.why is not None
    assert ("llama-2" if status == 200 else "/server_info") in found.why
