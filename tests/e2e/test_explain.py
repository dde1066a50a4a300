"""Decisions that the gateway keeps, and `matrixinfer explain`, which shows them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from matrixinfer.cli import main
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig

from .fleet import Fleet, fleet

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
COMPLETIONS = "/v1/completions"
ENGINE = SimEngineConfig(model="m", block_size=16, num_blocks=5_000)
BODY = {"model": "m", "prompt": list(range(300)), "max_tokens": 1}


async def decisions(gateway: Fleet, **query: str) -> list[Any]:
    url = f"{gateway.service.gateway.admin_url}/debug/decisions"
    async with gateway.session.get(url, params=query) as response:
        assert response.status == 200
        found: list[Any] = (await response.json())["decisions"]
        return found


async def explain(gateway: Fleet, *arguments: str) -> int:
    return await asyncio.to_thread(main, ["explain", "--admin", gateway.service.gateway.admin_url or "", *arguments])


async def test_predicted_and_reported_hits_are_shown_together(
    tokenizer: LocalTokenizer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async with fleet(tokenizer, ENGINE, pods=2) as gateway:
        for number in range(2):
            headers = {"x-request-id": f"request-{number}"}
            async with gateway.session.post(gateway.url + COMPLETIONS, json=BODY, headers=headers) as response:
                assert response.status == 200
                pod = response.headers["x-matrixinfer-pod"]
            await gateway.settled()
        second, first = await decisions(gateway)
        assert (first["predicted_hit_tokens"], second["predicted_hit_tokens"]) == (0, 256)
        reported = {"attempts": [pod], "sent_ids": False, "status": 200, "prompt_tokens": 300, "cached_tokens": 288}
        assert second["reported"] == reported | {"cached_tokens": 288}
        assert second["pods"][pod]["trust"] == "exact"
        assert [each["id"] for each in await decisions(gateway, limit="1")] == ["request-1"]
        assert await decisions(gateway, id="nobody") == await decisions(gateway, pod="nobody") == []

        capsys.readouterr()
        assert await explain(gateway, "--pod", "nobody") == 0
        assert capsys.readouterr().out == "no decisions for the pod nobody\n"
        assert await explain(gateway) == 0
        assert capsys.readouterr().out.count("request-") == 2
        assert await explain(gateway, "request-1") == 0
        shown = capsys.readouterr().out
        assert f"sent to {pod}; answered 200; the engine reported" in shown
        assert "288 of 300 tokens cached" in shown
        assert await explain(gateway, "request-1", "--json") == 0
        assert json.loads(capsys.readouterr().out)["decisions"] == await decisions(gateway, id="request-1")
        body = tmp_path / "body.json"
        body.write_text(json.dumps(BODY))
        assert await explain(gateway, "--body", str(body), "--path", COMPLETIONS) == 0
        assert f"tokens on {pod}" in capsys.readouterr().out
        assert len(await decisions(gateway)) == 2  # decisions on --body are not kept

        assert await explain(gateway, "nobody") == 2
        assert "the gateway has no decision on the request `nobody`" in capsys.readouterr().err
        assert await explain(gateway, "--body", str(tmp_path / "absent")) == 2
        assert await explain(gateway, "--body", str(body), "--path", "/v1/nothing") == 2
        assert "cannot read" in capsys.readouterr().err
        assert await explain(gateway, "--body", str(body)) == 2
        assert "add --path /v1/completions" in capsys.readouterr().err
        assert await explain(gateway, "request-1", "--body", str(body)) == 2
        assert "got both" in capsys.readouterr().err


async def test_the_guide_shows_the_real_output(tokenizer: LocalTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"```console\n\$ matrixinfer explain(.*)\n((?:.*\n)*?)```", GUIDE.read_text())
    assert len(shown) == 2
    engine = SimEngineConfig(model="Qwen/Qwen3-8B", block_size=16, num_blocks=5_000)
    async with fleet(tokenizer, engine, pods=2) as gateway:
        await gateway.settled()
        for turn, tokens in ((1, 2000), (2, 2300)):
            body = {"model": "Qwen/Qwen3-8B", "prompt": list(range(tokens)), "max_tokens": 1}
            headers = {"x-request-id": f"chat-7-turn-{turn}"}
            async with gateway.session.post(gateway.url + COMPLETIONS, json=body, headers=headers) as response:
                assert response.status == 200
                await response.read()
            await gateway.settled()
        for arguments, expected in shown:
            capsys.readouterr()
            assert await explain(gateway, *arguments.split()) == 0
            assert without_times(capsys.readouterr().out) == without_times(expected)


def decision(identity: str, attempts: list[str], status: int | None) -> dict[str, Any]:
    """A decision for pod a, as the admin address serves it."""
    pod = dict.fromkeys(
        (
            *("matched_blocks", "pending_blocks", "recent_blocks", "recent_chunks"),
            *("reuse", "credit", "in_flight", "waiting", "total"),
        ),
        0,
    )
    return {
        "id": identity,
        "at": 0.0,
        "path": COMPLETIONS,
        "model": "m",
        "tokens": 1,
        "unknown_tokens": 0,
        "other_tokens": 0,
        "blocks": 1,
        "chunks": 0,
        "chosen": "a",
        "predicted_hit_tokens": 77,
        "guessed_hit_tokens": 0,
        "reported": {"attempts": attempts, "status": status, "prompt_tokens": None, "cached_tokens": None},
        "candidates": 2,
        "pods": {
            name: {**pod, "tiers": [], "scores": {}, "filtered": None, "trust": trust}
            for name, trust in (("a", "exact"), ("b", "stale"))
        },
        "notes": [],
    }


async def test_the_limits_of_what_is_known_are_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    made = decision("r", ["a"], 200)
    made["pods"]["c"] = dict(made["pods"]["b"])
    for name, limits in (("a", ["some"]), ("b", ["all; do this", "some"]), ("c", ["all; do this"])):
        made["pods"][name]["limits"] = limits

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"decisions": [made]})

    app = web.Application()
    app.router.add_get("/debug/decisions", answer)
    async with TestServer(app) as admin:
        assert await asyncio.to_thread(main, ["explain", "--admin", str(admin.make_url("")), "r"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["a (exact): some", "b, c (stale): all; do this", "b (stale): some"]


async def test_an_address_that_is_not_the_admin_address_is_named(
    tokenizer: LocalTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with fleet(tokenizer, ENGINE, pods=1) as gateway:
        assert await asyncio.to_thread(main, ["explain", "--admin", gateway.url]) == 2
    assert "Is --admin the `admin` address of its config?" in capsys.readouterr().err


async def test_a_retry_and_a_request_without_an_answer_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    made = [decision("retried", ["a", "b"], 200), decision("lost", ["a"], None)]

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"decisions": made})

    app = web.Application()
    app.router.add_get("/debug/decisions", answer)
    async with TestServer(app) as admin:
        assert await asyncio.to_thread(main, ["explain", "--admin", str(admin.make_url(""))]) == 0
        _, retried, lost = (line.split() for line in capsys.readouterr().out.splitlines())
        assert retried[1:] == ["retried", "m", "1", "b", "stale", "-", "-", "200"]
        assert lost[1:] == ["lost", "m", "1", "a", "exact", "77", "-", "-"]
        assert await asyncio.to_thread(main, ["explain", "--admin", str(admin.make_url("")), "x"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert "\nprompt: 1 token, 1 full block\n" in first
    assert "\nsent to a, then b; answered 200; the engine did not report cached tokens\n" in first
    assert "\nsent to a; no answer\n" in second


async def test_what_is_known_by_bytes_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    made = decision("image", ["a"], 200) | {
        "tokens": 20,
        "unknown_tokens": 1500,
        "other_tokens": 30,
        "chunks": 4,
        "guessed_hit_tokens": 1200,
    }

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"decisions": [made]})

    app = web.Application()
    app.router.add_get("/debug/decisions", answer)
    async with TestServer(app) as admin:
        assert await asyncio.to_thread(main, ["explain", "--admin", str(admin.make_url("")), "image"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "prompt: 20 tokens, 1 full block, about 1500 tokens with unknown ids (4 chunks of bytes)" in shown
    assert ", about 30 tokens in other prompts predicted hit: 77 tokens on a, and about 1200 more by the bytes" in shown
    assert "recent_blocks recent_chunks reuse credit" in shown


def without_times(text: str) -> list[str]:
    """Lines without the time of day, and without estimates: they rest on how fast the pod has answered."""
    lines = [re.sub(r"\d\d:\d\d:\d\d", "", line).rstrip() for line in text.splitlines()]
    return [re.sub(r"\d+\.\d\b *", "# ", line) if line.startswith(" pod-") else line for line in lines]


def test_a_gateway_that_is_down_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--admin", "127.0.0.1:9"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "matrixinfer: cannot reach the gateway's admin address http://127.0.0.1:9: connection refused. "
    )
    assert "Is the gateway running" in err
