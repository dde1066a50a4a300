"""Renders chat templates as Hugging Face transformers renders them.

The dialect (sandbox, whitespace control, `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`, continuing a
final message) is that of `apply_chat_template` in transformers 5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt import effort, template_limits
from matrixinfer.prompt.content_format import sglang_passes_parts, vllm_passes_parts
from matrixinfer.prompt.dialect import Dialect
from matrixinfer.prompt.resuming import VARIABLE, Rendering
from matrixinfer.prompt.sandbox import Sandbox

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson ~ '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- elif message.content %}
        {%- for part in message.content if part.type == 'text' %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' ~ call.function | tojson ~ '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""The built-in template `chatml`: `<|im_start|>{role}\\n{content}<|im_end|>\\n` per message, tools as JSON lines first."""

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
"""Variables that `ChatTemplate.render` sets itself; a request cannot override them."""

_REASONING = ("reasoning_content", "thinking", "reasoning")

_SECONDS = 10.0
"""How long a template may take where its caller has set no other limit."""
_FINAL_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A compiled template. Special tokens become variables of the template; a token that is None stays undefined.

    `now` is the clock of `strftime_now`. With `aliases_reasoning`, templates get a message's reasoning under all its names,
    as from transformers 5.21 on; the engines known so far require older versions. Raises `TokenizeError` if `source` is not a valid template.
    """

    def __init__(
        self,
        source: str,
        *,
        now: Callable[[], datetime] = datetime.now,
        aliases_reasoning: bool = True,
        **special_tokens: str | None,
    ) -> None:
        environment = Sandbox(now=now)
        try:
            tree = environment.parse(source)
            self._parts = _forms_of_content(source, tree)
            self._template = environment.compiled(tree)
            self._continuing = environment.compiled(environment.parse(source), continues=True)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise TokenizeError(f"the chat template does not compile: {error}") from error
        self.source = source
        self.knows_developers = '"developer"' in source or "'developer'" in source
        """True when the template mentions the role `developer`; vLLM searches for the quoted word in the same way."""
        self._aliases_reasoning = aliases_reasoning
        self._reads_content = "content" in source
        self.bos_token = special_tokens.get("bos_token")
        self._special_tokens = {name: token for name, token in special_tokens.items() if token is not None}

    def takes_parts(self, dialect: Dialect) -> bool:
        """Whether engines of this dialect pass a message's content as a list of parts, not as one string.

        Raises `TokenizeError` if that depends on a version that is not known.
        """
        takes = self._parts[dialect]
        if takes is None:
            raise TokenizeError("the form of this template's content depends on the engine's version, which is unknown")
        return takes

    def shaped(self, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template gets them, each shaped by itself."""
        return [_shaped(message, aliases=self._aliases_reasoning) for message in messages]

    def render(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. `messages` are not modified; `variables` are further variables from the request.

        Raises `TokenizeError` for any failure. Its message may quote the template's own error text, never the prompt.
        """
        return self.render_shaped(
            self.shaped(messages),
            tools,
            documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def render_shaped(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any],
        rendering: Rendering | None = None,
    ) -> str:
        """As `render`, from messages that `shaped` has made.

        A new `rendering` may continue an earlier one of this template, and can then be continued itself.
        """
        if continue_final_message:
            if add_generation_prompt:
                raise TokenizeError("`continue_final_message` and `add_generation_prompt` cannot both be set")
            messages, final = self._marked(messages)
        context: dict[str, Any] = {
            **self._special_tokens,
            **variables,
            "messages": list(messages),
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with contextlib.nullcontext() if effort.is_under_way() else effort.Effort(_SECONDS):
                text = self._template.render(context) if rendering is None else self._continue(context, rendering)
        except effort.Abandoned:
            raise
        except jinja2.TemplateError as error:
            raise TokenizeError(f"the chat template failed: {error.message}") from error
        except Exception as error:  # boundary: a template is a foreign program and may raise anything
            raise TokenizeError(f"the chat template failed: {type(error).__name__}") from error
        return _cut(text, final) if continue_final_message else text

    def _continue(self, context: dict[str, Any], rendering: Rendering) -> str:
        write = rendering.written.append
        template = self._continuing
        # Not `generate`, which passes each text on once more.
        for text in template.root_render_func(template.new_context({**context, VARIABLE: rendering})):
            write(text)
        return template_limits.joined(rendering.written)

    def _marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
        """The messages with a mark after the text to continue, and that text."""
        if not messages:
            raise TokenizeError("there is no message to continue")
        *before, last = messages
        content = last.get("content")
        if self._reads_content and isinstance(content, str):
            return [*before, {**last, "content": content + _FINAL_MARK}], content
        if self._reads_content and isinstance(content, list):
            for i in range(len(content) - 1, -1, -1):
                if isinstance(content[i], dict) and isinstance(content[i].get("text"), str):
                    part = {**content[i], "text": content[i]["text"] + _FINAL_MARK}
                    return [*before, {**last, "content": [*content[:i], part, *content[i + 1 :]]}], content[i]["text"]
        raise TokenizeError("the final message has no text to continue")


def _forms_of_content(source: str, tree: jinja2.nodes.Template) -> Mapping[Dialect, bool | None]:
    """For each dialect whether content is a list of parts; None if its versions differ in that."""
    newest, middle = vllm_passes_parts(tree), vllm_passes_parts(tree, namespaces=False)
    oldest = vllm_passes_parts(tree, macros=False, namespaces=False)
    vllm = {
        Dialect.VLLM: newest,
        Dialect.VLLM_31: middle,
        Dialect.VLLM_30: middle,
        Dialect.VLLM_24: oldest,
        Dialect.VLLM_OLD: oldest,
    }
    unknown = newest if len(set(vllm.values())) == 1 else None
    sglang = sglang_passes_parts(source, tree)
    return {**vllm, Dialect.VLLM_UNKNOWN: unknown, **{each: sglang for each in Dialect if each.is_sglang}}


def _shaped(message: Mapping[str, Any], *, aliases: bool) -> dict[str, Any]:
    """A message without its null values; with `aliases`, its reasoning under every name that templates use for it."""
    shaped = {key: value for key, value in message.items() if value is not None}
    for name in _REASONING if aliases else ():
        if name in shaped:
            return {"thinking": shaped[name], **shaped, "reasoning_content": shaped[name]}
    return shaped


def _cut(text: str, final: str) -> str:
    at = text.rfind(_FINAL_MARK.rstrip())
    if at < 0 or final.strip() not in text:
        raise TokenizeError("the chat template drops the final message, so it cannot be continued")
    # A template that trims the message also strips the mark's trailing blank, and would have stripped the text's.
    return text[:at] if text.startswith(_FINAL_MARK, at) else text[:at].rstrip()
