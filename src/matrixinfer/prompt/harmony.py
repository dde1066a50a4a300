"""Chats of gpt-oss in the harmony format, encoded by the harmony library as vLLM encodes them.

vLLM uses no chat template for these models. The conversation is built here from the messages as vLLM builds it; the
library, which carries its vocabulary, turns it into token ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import numpy as np
import openai_harmony as library
from openai_harmony import Author, DeveloperContent, Message, ReasoningEffort, Role, SystemContent, TextContent

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat, Prompt, Tokenizer, Tokens
from matrixinfer.prompt.conversation import engine_tools, has_media
from matrixinfer.prompt.dialect import Dialect

_EFFORTS = {"high": ReasoningEffort.HIGH, "medium": ReasoningEffort.MEDIUM, "low": ReasoningEffort.LOW}
_KNOWN = (Dialect.VLLM, Dialect.VLLM_31)
"""Older versions use another library, which writes the headers of tool results differently."""
_INSTRUCTING = ("system", "developer")
_RESPONSES_PATH = "/v1/responses"
_SAMPLE = "Größe: 1234567.89 km²\r\n\tnaïve —\u200b「東京」 한국어 🤷🏽‍♀️ don't WON'T x_1 = [0xFF, -3e10]\n\n\n end "


class HarmonyTokenizer:
    """Encodes chats for vLLM in the harmony format, and leaves everything else to `tokenizer`. Thread-safe.

    `now` is the clock of the date in the system message.
    """

    name = "harmony"
    inline_bytes = 4 * 1024

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoding: library.HarmonyEncoding,
        *,
        now: Callable[[], datetime] = datetime.now,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoding = encoding
        self._now = now
        self._clock = clock
        self._marks = {
            mark: encoding.encode(mark, allowed_special="all")[0]
            for mark in ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>")
        }

    @classmethod
    def load(cls, tokenizer: Tokenizer) -> HarmonyTokenizer | None:
        """The tokenizer with the library's vocabulary; None if that is not the vocabulary of `tokenizer`."""
        encoding = library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)
        prompt = Prompt(
            path="",
            model="",
            stream=False,
            chat=None,
            text=_SAMPLE,
            token_ids=None,
            add_special_tokens=False,
            cache_salt=None,
            size=0,
            prefix=b"",
        )
        same = tokenizer.tokenize(prompt).ids.tolist() == encoding.encode(_SAMPLE, disallowed_special=())
        return cls(tokenizer, encoding) if same else None

    def tokenize(self, prompt: Prompt, dialect: Dialect = Dialect.VLLM) -> Tokens:
        """See `Tokenizer.tokenize`."""
        if prompt.chat is None or dialect.is_sglang:
            return self._tokenizer.tokenize(prompt, dialect)  # SGLang renders the template of gpt-oss
        if dialect not in _KNOWN:
            raise TokenizeError(f"how {dialect.value} renders gpt-oss is not known here")
        if prompt.path == _RESPONSES_PATH or prompt.keep_last is not None:
            raise TokenizeError("how vLLM renders this request for gpt-oss is not known here")
        start = self._clock()
        try:
            ids = self._ids(_messages(prompt.chat, self._now().strftime("%Y-%m-%d")))
        except TokenizeError:
            raise
        except Exception as error:  # noqa: BLE001 - boundary: the library's validation raises many types
            # Not `from error`: its messages quote the prompt.
            raise TokenizeError(f"the harmony library refused the prompt: {type(error).__name__}") from None
        took = {"tokenize": (self._clock() - start) * 1e3}
        return Tokens(ids=np.array(ids, dtype=np.uint32), timings_ms=took)

    def _ids(self, messages: list[Message]) -> list[int]:
        conversation = library.Conversation.from_messages(_without_old_analyses(messages))
        keeps = library.RenderConversationConfig(auto_drop_analysis=False)
        ids = self._encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, config=keeps)
        return list(self._with_recipients_first(ids))

    def _with_recipients_first(self, ids: list[int]) -> Iterator[int]:
        """The ids with the headers of tool calls as gpt-oss was trained on them, which vLLM restores.

        The library writes `assistant<|channel|>commentary to=NAME <|constrain|>json`; the models know
        `assistant to=NAME<|channel|>commentary json`.
        """
        header: list[int] | None = None
        for each in ids:
            if header is None:
                yield each
                header = [] if each == self._marks["<|start|>"] else None
            elif each == self._marks["<|message|>"]:
                yield from (*self._header(header), each)
                header = None
            else:
                header.append(each)
        yield from header or ()

    def _header(self, ids: list[int]) -> list[int]:
        channel, constrain = self._marks["<|channel|>"], self._marks["<|constrain|>"]
        if channel not in ids or constrain not in ids:
            return ids
        middle, last = ids.index(channel), ids.index(constrain)
        parts = (ids[:middle], ids[middle + 1 : last], ids[last + 1 :])
        author, named, kind = map(self._encoding.decode, parts)
        name, to, recipient = named.partition(" to=")
        if author != "assistant" or not to or not recipient.endswith(" ") or not name or not recipient[:-1] or not kind:
            return ids
        return [
            *self._encoding.encode(f"assistant to={recipient[:-1]}"),
            channel,
            *self._encoding.encode(f"{name} {kind}"),
        ]


def _messages(chat: Chat, date: str) -> list[Message]:
    """The conversation that vLLM builds from a chat. Raises `TokenizeError`."""
    if has_media(chat.messages):
        raise TokenizeError("the prompt contains images, audio or video")
    if chat.joins_system:
        raise TokenizeError("vLLM may merge the system messages of this request")
    messages = chat.messages
    instructions = None
    if messages[0].get("role") in _INSTRUCTING:
        instructions, messages = _text(messages[0].get("content")), messages[1:]
    built = [_system(chat, date)]
    tools = engine_tools(chat.tools)
    if instructions or tools:
        built.append(_developer(instructions, tools))
    names = {
        call.get("id"): call.get("function", {}).get("name")
        for message in messages
        for call in message.get("tool_calls") or ()
    }
    return [*built, *(each for message in messages for each in _converted(message, names))]


def _system(chat: Chat, date: str) -> Message:
    content = SystemContent.new()
    effort = _effort(chat)
    if effort is not None:
        if effort not in _EFFORTS:
            raise TokenizeError("gpt-oss has no such reasoning effort")
        content = content.with_reasoning_effort(_EFFORTS[effort])
    return Message.from_role_and_content(Role.SYSTEM, content.with_conversation_start_date(date))


def _effort(chat: Chat) -> object:
    """The reasoning effort. A chat's own template variables do not count, but other APIs set theirs by them."""
    if chat.sent is not None:
        return chat.sent.reasoning_effort
    if chat.thinking_off:
        return "low"  # vLLM turns thinking off by the lowest effort that the format has
    return (chat.chat_template_kwargs or {}).get("reasoning_effort")


def _developer(instructions: str | None, tools: Iterable[Mapping[str, Any]] | None = None) -> Message:
    content = DeveloperContent.new()
    if instructions is not None:
        content = content.with_instructions(instructions)
    described = [
        library.ToolDescription.new(
            name=tool["function"]["name"],
            description=tool["function"]["description"] or "",
            parameters=tool["function"]["parameters"],
        )
        for tool in tools or ()
    ]
    if described:
        content = content.with_function_tools(described)
    return Message.from_role_and_content(Role.DEVELOPER, content)


def _converted(message: Mapping[str, Any], names: Mapping[object, object]) -> Iterator[Message]:
    """The messages in the harmony format for one message of a chat; `names` are the functions' names by call id."""
    role, content = message.get("role"), message.get("content")
    if role == "assistant":
        yield from _assistant(message)
    elif role == "tool":
        author = Author.new(Role.TOOL, f"functions.{names.get(message.get('tool_call_id', ''), '')}")
        result = Message.from_author_and_content(author, _text(content) or "")
        yield result.with_channel("commentary").with_recipient("assistant")
    elif role in _INSTRUCTING:
        if (instructions := _text(content)) is not None:
            yield _developer(instructions)
    else:
        yield Message.from_role_and_contents(Role(role), _contents(content))


def _assistant(message: Mapping[str, Any]) -> Iterator[Message]:
    reasoning = message.get("reasoning")
    reasoning = message.get("reasoning_content") if reasoning is None else reasoning
    analysis = [_spoken(reasoning, "analysis")] if reasoning else []
    calls = message.get("tool_calls")
    if not calls:
        yield from analysis
        contents = _contents(message.get("content"))
        if contents and contents[0].text:
            yield Message.from_role_and_contents(Role.ASSISTANT, contents).with_channel("final")
        return
    if text := _text(message.get("content")):
        yield _spoken(text, "commentary")
    yield from analysis
    for call in calls:
        function = call.get("function", {})
        called = _spoken(function.get("arguments") or "", "commentary")
        yield called.with_recipient(f"functions.{function.get('name', '')}").with_content_type("json")


def _spoken(text: str, channel: str) -> Message:
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def _contents(content: object) -> list[TextContent]:
    if isinstance(content, list):
        return [TextContent(text=part.get("text", "")) for part in content]
    return [TextContent(text=content or "")]


def _text(content: object) -> str | None:
    """The text of all parts together; None if there is none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [text for part in content if (text := part if isinstance(part, str) else part.get("text")) is not None]
    return "".join(texts) if texts else None


def _without_old_analyses(messages: list[Message]) -> list[Message]:
    """The messages without the reasoning that precedes the last final answer."""
    finals = [i for i, each in enumerate(messages) if each.author.role == Role.ASSISTANT and each.channel == "final"]
    last = finals[-1] if finals else -1
    return [each for i, each in enumerate(messages) if i >= last or each.channel != "analysis"]
