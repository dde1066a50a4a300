"""Traits of a model's chat templates that vLLM probes at start, to serve Anthropic's Messages API with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec.structs import replace

from matrixinfer.errors import TokenizeError
from matrixinfer.prompt.base import Chat
from matrixinfer.prompt.fields import template_variables

_TURNS = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTraits:
    """How chats from Anthropic's Messages API must be adapted to a model's templates."""

    joins_system: bool
    """At least one template refuses later system messages, so they are merged into the first one."""
    disabled_effort: Literal["none", "low"]
    """The reasoning effort that disables thinking."""


def probe(sources: Iterable[str], render: Callable[[Chat], str]) -> TemplateTraits:
    """Probe a model's templates, given as Jinja sources. `render` renders a chat with them or raises `TokenizeError`."""
    joins = any(_refuses_later_system(source) for source in sources)
    return TemplateTraits(joins_system=joins, disabled_effort="none" if _knows_none(render) else "low")


def adapt(chat: Chat, traits: TemplateTraits) -> Chat:
    """The chat as vLLM passes it to templates with these traits."""
    if chat.joins_system and traits.joins_system:
        text = "".join(message["content"] for message in chat.messages if message["role"] == "system")
        others = [message for message in chat.messages if message["role"] != "system"]
        chat = replace(chat, messages=[{"role": "system", "content": text}, *others])
    if chat.thinking_off and traits.disabled_effort == "low":
        variables = (chat.chat_template_kwargs or {}) | {"reasoning_effort": "low", "enable_thinking": True}
        chat = replace(chat, chat_template_kwargs=variables)
    return chat


def _refuses_later_system(source: str) -> bool:
    # As in vLLM, this environment is barer than the one that renders; a template that needs more fails here, too.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    try:
        environment.from_string(source).render(messages=_TURNS, add_generation_prompt=False)
    except Exception:  # noqa: BLE001 - boundary: a template is a foreign program and may raise anything
        return True
    return False


def _knows_none(render: Callable[[Chat], str]) -> bool:
    """True when the effort "none" renders a different prompt than every other effort."""

    def at(effort: str) -> str | None:
        variables = template_variables(None, effort=effort)
        try:
            return render(Chat(messages=[{"role": "user", "content": "Hi"}], chat_template_kwargs=variables))
        except TokenizeError:
            return None

    none = at("none")
    return none is not None and all(at(effort) != none for effort in _EFFORTS)
