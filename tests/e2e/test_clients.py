"""The official clients of OpenAI and Anthropic, in front of the gateway: every call that vLLM serves, with typed errors."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import msgspec
import openai
import pytest
import pytest_asyncio

from matrixinfer.app.service import Service
from matrixinfer.config import ApiConfig, ModelConfig, checked
from matrixinfer.prompt.local import LocalTokenizer
from matrixinfer.sim.config import SimEngineConfig
from matrixinfer.sim.server import SimEngine
from tests.waiting import eventually

from .fleet import TOKENIZER, config_of, fleet
from .test_images import PLACEHOLDER, TEMPLATE

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

ENGINE = SimEngineConfig(model="org/big", block_size=16, num_blocks=2000, media_token=PLACEHOLDER)
MODEL = "big"
"""An alias: the engine knows the model by another name."""
HELLO: list[Any] = [{"role": "user", "content": "Hello, please tell me a story"}]
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


class Clients(NamedTuple):
    openai: openai.AsyncOpenAI
    anthropic: anthropic.AsyncAnthropic
    engines: list[SimEngine]
    url: str


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clients") / "template.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture(scope="module")
def media_tokenizer(template: Path) -> LocalTokenizer:
    return LocalTokenizer.load(TOKENIZER, str(template))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clients(media_tokenizer: LocalTokenizer, template: Path) -> AsyncIterator[Clients]:
    async with SimEngine(ENGINE, media_tokenizer) as first, SimEngine(ENGINE, media_tokenizer) as second:
        engines = [first, second]
        model = ModelConfig(name="org/big", aliases=(MODEL,), tokenizer=str(TOKENIZER), chat_template=str(template))
        config = msgspec.structs.replace(
            config_of(engines), models=(model,), api=ApiConfig(sse_keep_alive_seconds=0.05)
        )
        async with (
            Service(checked(config)) as service,
            openai.AsyncOpenAI(api_key="k", base_url=f"{service.gateway.url}/v1", max_retries=0) as one,
            anthropic.AsyncAnthropic(api_key="k", base_url=service.gateway.url, max_retries=0) as other,
        ):
            yield Clients(one, other, engines, service.gateway.url)


async def test_chats(clients: Clients) -> None:
    chat = await clients.openai.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=5)
    assert chat.model == MODEL
    assert chat.choices[0].message.content
    assert chat.usage is not None
    assert (chat.usage.completion_tokens, chat.choices[0].finish_reason) == (5, "length")
    stream = await clients.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {MODEL}
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == chat.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


async def test_several_choices_with_log_probabilities(clients: Clients) -> None:
    chat = await clients.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=4, n=3, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in chat.choices}) == 3
    for choice in chat.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    stream = await clients.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=4, n=3, logprobs=True, stream=True
    )
    said = ["", "", ""]
    async for chunk in stream:
        for piece in chunk.choices:
            said[piece.index] += piece.delta.content or ""
    assert said == [choice.message.content for choice in chat.choices]


async def test_images(clients: Clients) -> None:
    content: list[Any] = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    chat = await clients.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], max_completion_tokens=2
    )
    assert chat.choices[0].message.content


async def test_completions(clients: Clients) -> None:
    done = await clients.openai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=3, logprobs=1)
    assert done.choices[0].logprobs is not None
    assert done.choices[0].logprobs.tokens is not None
    assert "".join(done.choices[0].logprobs.tokens) == done.choices[0].text
    stream = await clients.openai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=3, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == done.choices[0].text


async def test_responses_and_what_is_stored_of_them(clients: Clients) -> None:
    made = [
        await clients.openai.responses.create(model=MODEL, input=f"Hello {i}", max_output_tokens=4) for i in range(4)
    ]
    for each in made:
        assert each.output_text
        again = await clients.openai.responses.retrieve(each.id)
        assert (again.id, again.output_text) == (each.id, each.output_text)
        follow = await clients.openai.responses.create(model=MODEL, input="And?", previous_response_id=each.id)
        assert follow.previous_response_id == each.id
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        await clients.openai.responses.cancel(made[0].id)
    with pytest.raises(openai.NotFoundError, match="No pod stores the response"):
        await clients.openai.responses.retrieve("resp_of_nobody")
    stream = await clients.openai.responses.create(model=MODEL, input="Hello 0", max_output_tokens=4, stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    done = events[-1]
    assert done.type == "response.completed"
    assert (done.response.output_text, done.response.model) == (made[0].output_text, MODEL)
    assert (await clients.openai.responses.retrieve(done.response.id)).output_text == made[0].output_text


async def test_a_response_that_another_gateway_passed_on_is_found(clients: Clients) -> None:
    engine = clients.engines[1]
    async with openai.AsyncOpenAI(api_key="k", base_url=f"{engine.url}/v1") as direct:
        made = await direct.responses.create(model="org/big", input="Hello")
    assert (await clients.openai.responses.retrieve(made.id)).output_text == made.output_text
    follow = await clients.openai.responses.create(model=MODEL, input="And?", previous_response_id=made.id)
    assert follow.previous_response_id == made.id


async def test_embeddings(clients: Clients) -> None:
    made = await clients.openai.embeddings.create(model=MODEL, input=["one text", "another text"])
    assert [each.index for each in made.data] == [0, 1]
    plain = await clients.openai.embeddings.create(model=MODEL, input="one text", encoding_format="float", dimensions=4)
    assert plain.data[0].embedding == pytest.approx(made.data[0].embedding[:4])


async def test_transcriptions_and_translations(clients: Clients) -> None:
    audio = io.BytesIO(bytes(range(256)) * 300)
    audio.name = "speech.wav"
    heard = await clients.openai.audio.transcriptions.create(model=MODEL, file=audio)
    assert heard.text
    audio.seek(0)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        text: Any = await clients.openai.audio.translations.create(model=MODEL, file=audio, response_format="text")
    assert text.strip('"') == heard.text
    with pytest.raises(openai.NotFoundError):
        await clients.openai.audio.transcriptions.create(model="nobody", file=audio)


async def test_models(clients: Clients) -> None:
    names = [model.id async for model in clients.openai.models.list()]
    assert names == ["big", "org/big"]
    assert (await clients.openai.models.retrieve("org/big")).id == "org/big"
    assert [model.id async for model in clients.anthropic.models.list()] == names
    with pytest.raises(openai.NotFoundError):
        await clients.openai.models.retrieve("nobody")


async def test_messages(clients: Clients) -> None:
    message = await clients.anthropic.messages.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert message.model == MODEL
    block = message.content[0]
    assert block.type == "text"
    assert message.usage.output_tokens == 5
    async with clients.anthropic.messages.stream(model=MODEL, messages=HELLO, max_tokens=5) as stream:
        said = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert (said, final.model, final.stop_reason) == (block.text, MODEL, "max_tokens")
    counted = await clients.anthropic.messages.count_tokens(model=MODEL, messages=HELLO)
    cached = message.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == message.usage.input_tokens + cached


PATHS: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/pooling": {"input": "Hello"},
    "/classify": {"input": ["Hello"]},
    "/score": {"text_1": "a b c", "text_2": ["d", "e"]},
    "/v1/score": {"queries": "a", "documents": "b"},
    "/rerank": {"query": "a", "documents": ["b", "c"], "top_n": 1},
    "/v2/rerank": {"query": "a", "documents": ["b", "c"]},
}


@pytest.mark.parametrize("path", PATHS)
async def test_what_no_client_has_a_method_for(clients: Clients, path: str) -> None:
    url = clients.url + path
    answer: Any = await clients.openai.post(url, cast_to=object, body={"model": MODEL, **PATHS[path]})
    shown = answer.get("data") or answer.get("results") or answer.get("tokens") or answer.get("prompt")
    assert shown
    if path == "/rerank":
        assert len(shown) == 1
    with pytest.raises(openai.NotFoundError):
        await clients.openai.post(url, cast_to=object, body={"model": "nobody", **PATHS[path]})


async def test_adapters_are_loaded_everywhere_and_served_at_once(clients: Clients) -> None:
    adapter = {"lora_name": "poet", "lora_path": "/adapters/poet"}
    with pytest.raises(openai.NotFoundError):
        await clients.openai.completions.create(model="poet", prompt="Hello", max_tokens=1)
    loaded: Any = await clients.openai.post("/load_lora_adapter", cast_to=object, body=adapter)
    assert {name: result["status"] for name, result in loaded["results"].items()} == {"pod-0": 200, "pod-1": 200}
    for _ in range(4):
        assert (await clients.openai.completions.create(model="poet", prompt="Hello", max_tokens=1)).model == "poet"
    with pytest.raises(openai.BadRequestError, match="2 of 2 pods"):
        await clients.openai.post("/load_lora_adapter", cast_to=object, body=adapter)
    await clients.openai.post("/unload_lora_adapter", cast_to=object, body=adapter)


async def test_a_client_that_leaves_a_stream_ends_it_at_the_engine(clients: Clients) -> None:
    stream = await clients.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2000, stream=True)
    async for _ in stream:
        break
    await stream.close()
    ranks = [rank for engine in clients.engines for rank in engine.ranks]
    await eventually(lambda: not any(rank.driver.in_flight for rank in ranks))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"messages": []}, openai.BadRequestError),
        ({"messages": "text"}, openai.BadRequestError),
        ({"max_completion_tokens": 0}, openai.BadRequestError),
        ({"n": 0}, openai.BadRequestError),
        ({"max_completion_tokens": 10_000_000}, openai.BadRequestError),
    ],
)
async def test_errors_are_typed(clients: Clients, fields: dict[str, Any], error: type[openai.APIStatusError]) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": HELLO, **fields}
    with pytest.raises(error) as caught:
        await clients.openai.chat.completions.create(**request)
    assert caught.value.request_id
    assert caught.value.message
    for stream in (True, False):
        with pytest.raises(error):
            await clients.openai.chat.completions.create(**request, stream=stream)


async def test_errors_of_messages_are_typed(clients: Clients) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        await clients.anthropic.messages.create(model="nobody", messages=HELLO, max_tokens=1)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        await clients.anthropic.messages.create(model=MODEL, messages=[], max_tokens=1)
    with pytest.raises(anthropic.BadRequestError):  # by the engine
        await clients.anthropic.messages.create(model=MODEL, messages=HELLO, max_tokens=10_000_000, timeout=60)


async def test_nobody_to_answer_is_a_typed_error_too(tokenizer: LocalTokenizer) -> None:
    async with fleet(tokenizer, SimEngineConfig(model="m"), pods=1) as target:
        client = openai.AsyncOpenAI(api_key="k", base_url=f"{target.url}/v1", max_retries=0)
        claude = anthropic.AsyncAnthropic(api_key="k", base_url=target.url, max_retries=0)
        target.service.leave("pod-0")
        async with client, claude:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="m", messages=HELLO)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"] == "1"
            with pytest.raises(anthropic.APIStatusError) as refused:
                await claude.messages.create(model="m", messages=HELLO, max_tokens=1)
            assert refused.value.status_code == 503
