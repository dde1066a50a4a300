"""The remote tokenizer against servers that answer as vLLM 0.32 does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.openai import CHAT_PATH, COMPLETIONS_PATH
from matrixinfer.prompt.remote import PromptRefused, RemoteTokenizer
from matrixinfer.prompt.requests import parse
from tests.waiting import DEADLINE_SECONDS, eventually

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
FOREVER = 3600.0
SOON = 2.0
"""Seconds: the deadline where an engine does not answer."""
HELLO = [{"content": "hello", "role": "user"}]


async def vllm(request: web.Request) -> web.StreamResponse:
    """A reply as captured from the engine."""
    return web.json_response({"count": 2, "max_model_len": 8192, "tokens": [9707, 1879], "token_strs": None})


@dataclass
class Engine:
    """A real server on a free port whose answer each test chooses."""

    handler: Handler = vllm
    bodies: list[Any] = field(default_factory=list)
    url: str = ""
    engine: str | None = "vllm"
    version: str | None = "0.33.0"
    names: dict[str, str] = field(default_factory=dict)

    def index_name(self, name: str) -> str | None:
        return self.names.get(name)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(json.loads(await request.read()))
        return await self.handler(request)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    app = web.Application()
    app.router.add_post("/tokenize", made.handle)
    async with TestServer(app) as server:
        made.url = str(server.make_url(""))
        yield made


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


def text(value: str, **fields: Any) -> Prompt:
    return parse(COMPLETIONS_PATH, json.dumps({"model": "alias", "prompt": value} | fields).encode())


def chat(**fields: Any) -> Prompt:
    return parse(CHAT_PATH, json.dumps({"model": "alias", "messages": HELLO} | fields).encode())


async def test_a_text_is_asked_for_as_vllm_expects(engine: Engine, session: aiohttp.ClientSession) -> None:
    ids = await RemoteTokenizer(session).tokenize(
        text("hello world"), [engine], "tiny", timeout_seconds=DEADLINE_SECONDS
    )
    assert ids.tolist() == [9707, 1879]
    assert ids.dtype.name == "uint32"
    assert engine.bodies == [{"model": "tiny", "prompt": "hello world", "add_special_tokens": True}]


async def test_a_chat_is_asked_for_as_vllm_expects(engine: Engine, session: aiohttp.ClientSession) -> None:
    await RemoteTokenizer(session).tokenize(chat(), [engine], "tiny", timeout_seconds=DEADLINE_SECONDS)
    assert engine.bodies == [
        {
            "model": "tiny",
            "messages": HELLO,
            "add_generation_prompt": True,
            "continue_final_message": False,
            "add_special_tokens": False,
        }
    ]
    assert list(engine.bodies[0]["messages"][0]) == ["content", "role"]


async def test_everything_that_changes_the_ids_is_passed_on(engine: Engine, session: aiohttp.ClientSession) -> None:
    fields = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template": "{{ messages }}",
        "add_generation_prompt": False,
        "continue_final_message": True,
        "add_special_tokens": True,
    }
    more = {"chat_template_kwargs": {"mood": 1}, "documents": [{"text": "d"}], "temperature": 1}
    await RemoteTokenizer(session).tokenize(chat(**fields, **more), [engine], "tiny", timeout_seconds=DEADLINE_SECONDS)
    (body,) = engine.bodies
    assert body.pop("chat_template_kwargs") == {"mood": 1, "documents": [{"text": "d"}]}
    assert body == {"model": "tiny", "messages": HELLO} | fields


def answering(status: int = 200, body: bytes = b"") -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers={"Location": "/tokenize"} if status == 302 else None)

    return handler


async def breaking(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cutting(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"tokens":[1,')
    assert request.transport is not None
    request.transport.abort()
    return response


async def hanging(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(FOREVER)
    return web.Response()


async def dripping(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'{"tokens":[')
    await asyncio.sleep(FOREVER)
    return response


async def flooding(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100):
        await response.write(b'{"tokens":[' + b"1," * 1000)
    return response


@pytest.mark.parametrize(
    "handler",
    [
        answering(400, b'{"error":{"message":"prompt lists are not supported"}}'),
        answering(404),
        answering(500),
        answering(302),
        answering(200, b""),
        answering(200, b"not json"),
        answering(200, b"\xff"),
        answering(200, b'{"count":0}'),
        answering(200, b'{"tokens":null}'),
        answering(200, b'{"tokens":["a"]}'),
        answering(200, b"[" * 5000),
        answering(200, b'{"tokens":[-1]}'),
        answering(200, b'{"tokens":[4294967296]}'),
        breaking,
        cutting,
        hanging,
        dripping,
        flooding,
    ],
)
async def test_every_failure_is_a_tokenize_error(
    engine: Engine, session: aiohttp.ClientSession, handler: Handler
) -> None:
    engine.handler = handler
    remote = RemoteTokenizer(session, max_response_bytes=10_000)
    with pytest.raises(TokenizeError):
        await remote.tokenize(text("x"), [engine], "tiny", timeout_seconds=0.5)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "not a url", "http://[bad"])
async def test_an_engine_out_of_reach_is_a_tokenize_error(session: aiohttp.ClientSession, url: str) -> None:
    with pytest.raises(TokenizeError):
        await RemoteTokenizer(session).tokenize(text("x"), [Engine(url=url)], "tiny", timeout_seconds=DEADLINE_SECONDS)


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    async with AsyncExitStack() as stack:
        made = [Engine() for _ in range(3)]
        for engine in made:
            app = web.Application()
            app.router.add_post("/tokenize", engine.handle)
            engine.url = str((await stack.enter_async_context(TestServer(app))).make_url(""))
        yield made


def counts(engines: list[Engine]) -> list[int]:
    return [len(engine.bodies) for engine in engines]


async def ids_of(
    remote: RemoteTokenizer, engines: list[Engine], prompt: Prompt | None = None, seconds: float = DEADLINE_SECONDS
) -> list[int]:
    ids = await remote.tokenize(prompt or text("x"), engines, "tiny", timeout_seconds=seconds)
    return [int(each) for each in ids]


async def test_engines_are_asked_in_turn(engines: list[Engine], session: aiohttp.ClientSession) -> None:
    remote = RemoteTokenizer(session)
    for _ in range(6):
        await ids_of(remote, engines)
    assert counts(engines) == [2, 2, 2]


@pytest.mark.parametrize("handler", [answering(500), answering(404), breaking, hanging, answering(200, b"no ids")])
async def test_the_next_engine_is_asked_when_one_fails(
    engines: list[Engine], session: aiohttp.ClientSession, handler: Handler
) -> None:
    engines[0].handler = handler
    seconds = SOON if handler is hanging else DEADLINE_SECONDS
    assert await ids_of(RemoteTokenizer(session), engines, seconds=seconds) == [9707, 1879]
    assert counts(engines) == [1, 1, 0]


@pytest.mark.parametrize("status", [400, 422])
async def test_what_one_engine_refuses_no_other_is_asked(
    engines: list[Engine], session: aiohttp.ClientSession, status: int
) -> None:
    engines[0].handler = answering(status)
    with pytest.raises(TokenizeError, match=f"refused the prompt with {status}"):
        await ids_of(RemoteTokenizer(session), engines)
    assert counts(engines) == [1, 0, 0]


async def test_two_engines_are_asked_at_most(engines: list[Engine], session: aiohttp.ClientSession) -> None:
    for engine in engines:
        engine.handler = answering(500)
    with pytest.raises(TokenizeError, match=r"answered 500; .* answered 500$"):
        await ids_of(RemoteTokenizer(session), engines)
    assert counts(engines) == [1, 1, 0]


async def test_an_engine_that_failed_is_asked_last_for_a_while(
    engines: list[Engine], session: aiohttp.ClientSession
) -> None:
    now = 0.0
    remote = RemoteTokenizer(session, clock=lambda: now)
    engines[0].handler = answering(503)
    for _ in range(4):
        await ids_of(remote, engines)
    assert counts(engines)[0] == 1
    assert await ids_of(remote, engines[1:]) == [9707, 1879]
    engines[0].handler = vllm
    assert await ids_of(remote, engines[:1]) == [9707, 1879]  # nobody else is there
    now = 6.0
    for _ in range(3):
        await ids_of(remote, engines)
    assert counts(engines)[0] == 3


async def test_an_engine_without_the_endpoint_is_not_asked_for_a_while(
    engines: list[Engine], session: aiohttp.ClientSession
) -> None:
    now = 0.0
    remote = RemoteTokenizer(session, clock=lambda: now)
    engines[0].handler = answering(404)
    for _ in range(3):
        with pytest.raises(TokenizeError):
            await ids_of(remote, engines[:1])
    assert counts(engines)[0] == 1
    now = 61.0
    engines[0].handler = vllm
    assert await ids_of(remote, engines[:1]) == [9707, 1879]


async def test_nobody_to_ask_is_a_tokenize_error(session: aiohttp.ClientSession) -> None:
    with pytest.raises(TokenizeError, match="no engine"):
        await ids_of(RemoteTokenizer(session), [])


def slowly(release: asyncio.Event) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return await vllm(request)

    return handler


async def test_equal_questions_at_the_same_time_are_asked_once(engine: Engine, session: aiohttp.ClientSession) -> None:
    release = asyncio.Event()
    engine.handler = slowly(release)
    remote = RemoteTokenizer(session)
    waiting = [asyncio.create_task(ids_of(remote, [engine])) for _ in range(5)]
    other = asyncio.create_task(ids_of(remote, [engine], text("other")))
    await eventually(lambda: len(engine.bodies) == 2)
    waiting[0].cancel()  # the others have their answer all the same
    release.set()
    assert await asyncio.gather(*waiting[1:], other) == [[9707, 1879]] * 5
    assert waiting[0].cancelled()
    assert len(engine.bodies) == 2
    await ids_of(remote, [engine])
    assert len(engine.bodies) == 3


async def test_a_question_that_nobody_waits_for_is_given_up(engine: Engine, session: aiohttp.ClientSession) -> None:
    release = asyncio.Event()
    engine.handler = slowly(release)
    remote = RemoteTokenizer(session)
    waiting = asyncio.create_task(ids_of(remote, [engine]))
    await eventually(lambda: len(engine.bodies) == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await eventually(lambda: not remote._under_way)  # noqa: SLF001 - nothing stays of a question
    release.set()
    assert await ids_of(remote, [engine]) == [9707, 1879]


async def test_a_question_that_is_being_given_up_is_not_joined(engine: Engine, session: aiohttp.ClientSession) -> None:
    release = asyncio.Event()
    engine.handler = slowly(release)
    remote = RemoteTokenizer(session)
    first = asyncio.create_task(ids_of(remote, [engine]))
    await eventually(lambda: len(engine.bodies) == 1)
    first.cancel()
    await asyncio.sleep(0)  # the question is on its way out
    second = asyncio.create_task(ids_of(remote, [engine]))
    await eventually(lambda: len(engine.bodies) == 2)
    release.set()
    assert await second == [9707, 1879]
    assert not remote._under_way  # noqa: SLF001 - nothing stays of a question


async def test_who_joins_a_question_keeps_a_deadline_of_its_own(engine: Engine, session: aiohttp.ClientSession) -> None:
    engine.handler = slowly(asyncio.Event())
    remote = RemoteTokenizer(session)
    first = asyncio.create_task(remote.tokenize(text("hello"), [engine], "tiny", timeout_seconds=60))
    await eventually(lambda: len(engine.bodies) == 1)
    with pytest.raises(TokenizeError, match="no engine answered within"):
        await remote.tokenize(text("hello"), [engine], "tiny", timeout_seconds=0.05)
    assert len(engine.bodies) == 1
    first.cancel()


async def test_an_engine_is_asked_under_its_own_name_of_the_model(
    engine: Engine, session: aiohttp.ClientSession
) -> None:
    engine.names = {"alias": "as it is called there"}
    await RemoteTokenizer(session).tokenize(
        text("hello"), [engine], "as others call it", timeout_seconds=DEADLINE_SECONDS
    )
    assert engine.bodies[0]["model"] == "as it is called there"


async def test_a_long_answer_is_decoded_as_well(engine: Engine, session: aiohttp.ClientSession) -> None:
    engine.handler = answering(body=json.dumps({"tokens": list(range(50_000))}).encode())
    assert await ids_of(RemoteTokenizer(session), [engine]) == list(range(50_000))


async def test_engines_that_do_not_rest_are_asked_on(engine: Engine, session: aiohttp.ClientSession) -> None:
    engine.handler = answering(404)
    remote = RemoteTokenizer(session, rests=False)
    for asked in (1, 2):
        with pytest.raises(TokenizeError):
            await ids_of(remote, [engine])
        assert len(engine.bodies) == asked


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("/v1/messages", {"messages": HELLO, "system": "s", "max_tokens": 1, "thinking": {"type": "disabled"}}),
        ("/v1/responses", {"input": [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}]}),
    ],
)
async def test_what_the_question_cannot_say_is_not_asked(
    engine: Engine, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    prompt = parse(path, json.dumps({"model": "alias"} | body).encode())
    with pytest.raises(TokenizeError):
        await ids_of(RemoteTokenizer(session), [engine], prompt)
    assert engine.bodies == []


async def test_sglang_is_asked_in_its_own_words(engine: Engine, session: aiohttp.ClientSession) -> None:
    engine.engine, engine.version = "sglang", "0.5.23"
    remote = RemoteTokenizer(session)
    sent = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "reasoning_effort": 0.5,
        "reasoning": {"enabled": True},
        "chat_template_kwargs": {"mood": 1},
    }
    await ids_of(remote, [engine], text("x", add_special_tokens=False))
    await ids_of(remote, [engine], chat(chat_template="{{ messages }}", add_generation_prompt=False, **sent))
    assert engine.bodies == [
        {"model": "tiny", "prompt": "x", "add_special_tokens": True},
        {"model": "tiny", "messages": HELLO, "continue_final_message": False, **sent},
    ]


@pytest.mark.parametrize("key", ["description", "parameters"])
async def test_sglang_is_not_asked_about_keys_that_its_tokenize_moves(
    engine: Engine, session: aiohttp.ClientSession, key: str
) -> None:
    engine.engine, engine.version = "sglang", "0.5.23"
    remote = RemoteTokenizer(session)
    prompt = chat(tools=[{"type": "function", "function": {key: None, "name": "f"}}])
    with pytest.raises(TokenizeError, match="orders the keys"):
        await ids_of(remote, [engine], prompt)
    engine.version = "0.5.22"
    await ids_of(remote, [engine], prompt)


@pytest.mark.parametrize(
    ("version", "fields", "reason"),
    [
        ("0.33.0", {}, None),
        ("0.32.0", {}, "before 0.33"),
        (None, {}, "before 0.33"),
        ("0.33.0", {"reasoning_effort": "low"}, "no field for the reasoning effort"),
    ],
)
async def test_gpt_oss_is_asked_for_only_where_tokenize_renders_harmony(
    engine: Engine, session: aiohttp.ClientSession, version: str | None, fields: dict[str, Any], reason: str | None
) -> None:
    engine.version, engine.names = version, {"alias": "openai/gpt-oss-20b"}
    with nullcontext() if reason is None else pytest.raises(TokenizeError, match=reason):
        await ids_of(RemoteTokenizer(session), [engine], chat(**fields))
    await ids_of(RemoteTokenizer(session), [engine], text("x"))


async def test_answers_are_remembered_until_engines_change(engine: Engine, session: aiohttp.ClientSession) -> None:
    remote = RemoteTokenizer(session, cache_bytes=10_000)
    assert await ids_of(remote, [engine]) == await ids_of(remote, [engine]) == [9707, 1879]
    assert len(engine.bodies) == 1
    await ids_of(remote, [engine], text("y"))
    assert len(engine.bodies) == 2
    remote.forget()
    await ids_of(remote, [engine])
    assert len(engine.bodies) == 3


async def test_failures_are_not_remembered(engine: Engine, session: aiohttp.ClientSession) -> None:
    remote = RemoteTokenizer(session, cache_bytes=10_000)
    engine.handler = answering(400)
    with pytest.raises(PromptRefused):
        await ids_of(remote, [engine])
    engine.handler = vllm
    assert await ids_of(remote, [engine]) == [9707, 1879]


async def test_engines_that_are_compared_do_not_share_answers(
    engines: list[Engine], session: aiohttp.ClientSession
) -> None:
    release = asyncio.Event()
    engines[0].handler = slowly(release)
    engines[1].handler = answering(200, b'{"tokens":[5]}')
    remote = RemoteTokenizer(session, rests=False, cache_bytes=10_000)
    first = asyncio.create_task(ids_of(remote, engines[:1]))
    await eventually(lambda: len(engines[0].bodies) == 1)
    assert await ids_of(remote, engines[1:2]) == [5]
    release.set()
    assert await first == [9707, 1879]
    assert await ids_of(remote, engines[1:2]) == [5]


async def test_what_asking_costs_is_measured_by_model(engine: Engine, session: aiohttp.ClientSession) -> None:
    seen: list[tuple[str, float]] = []
    now = 0.0

    async def slow(request: web.Request) -> web.StreamResponse:
        nonlocal now
        now += 0.25
        return await vllm(request)

    engine.handler = slow
    remote = RemoteTokenizer(session, on_answered=lambda *each: seen.append(each), clock=lambda: now)
    for _ in range(7):
        await ids_of(remote, [engine])
    assert remote.costs["tiny"].quantile(0.5) is None  # too few to say
    await ids_of(remote, [engine])
    assert remote.costs["tiny"].quantile(0.5) == 0.25
    engine.handler = answering(500)
    with pytest.raises(TokenizeError):
        await ids_of(remote, [engine])
    assert remote.costs["tiny"].view() == {"answers": 8, "failures": 1, "p50_ms": 250.0, "p90_ms": 250.0}
    assert seen == [("tiny", 0.25)] * 8
