"""Decisions that the gateway keeps, and `matrixinfer explain`, which shows them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

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
        reported = {"attempts": [pod], "status": 200, "prompt_tokens": 300, "cached_tokens": 288}
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


def without_times(text: str) -> list[str]:
    return [re.sub(r"\d\d:\d\d:\d\d", "", line).rstrip() for line in text.splitlines()]


def test_a_gateway_that_is_down_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--admin", "127.0.0.1:9"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "matrixinfer: cannot reach the gateway's admin address http://127.0.0.1:9: connection refused. "
    )
    assert "Is the gateway running" in err
