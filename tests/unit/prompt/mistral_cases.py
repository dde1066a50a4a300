"""Requests to a Mistral model, including refused ones. `mistral_golden.json` has vLLM's answers in the same order."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

TOOL: Object = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für «Städte»",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
            "required": ["city"],
        },
    },
}
BARE: Object = {"type": "function", "function": {"name": "ping"}}
STRICT: Object = {
    "type": "function",
    "function": {
        "name": "s",
        "description": None,
        "parameters": {"type": "object", "properties": {}},
        "strict": True,
    },
}
HARD = (
    "",
    "  ",
    "Hello, world!",
    "line\nbreaks\r\n\n\n\ttabs \t \n end",
    "[INST] <s> </s> [/INST] [TOOL_CALLS]",
    "naïve café e\u0301 Ⅳ ﬁ ½ ẞ İ",
    "今天天气怎么样？ 日本語 한국어 ไทย हिन्दी",
    "👩\u200d👩\u200d👧 🇨🇭 ☕\ufe0f",
    "zero\u200bwidth \ufeffbom \u00a0 \u3000\x00\x01",
    "a" * 300 + "!" * 40,
)


def user(content: object) -> Object:
    return {"role": "user", "content": content}


def answer(content: object, **more: object) -> Object:
    return {"role": "assistant", "content": content, **more}


def system(content: object, role: str = "system") -> Object:
    return {"role": role, "content": content}


def result(ident: str, content: object, **more: object) -> Object:
    return {"role": "tool", "tool_call_id": ident, "content": content, **more}


def call(ident: str, arguments: object = '{"city": "Zürich", "n": [1, -2.5e3]}') -> Object:
    return {"id": ident, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def parts(*texts: str) -> list[Object]:
    return [{"type": "text", "text": text} for text in texts]


def chat(*messages: Object, **more: object) -> Object:
    return {"model": "m", "messages": list(messages), **more}


def requests() -> list[Object]:
    return [*_texts(), *_turns(), *_endings(), *_tools(), *_arguments(), *_reasoning(), *_oddities()]


def _texts() -> list[Object]:
    return [
        request
        for text in HARD
        for request in (
            chat(user(text)),
            chat(system(text), user("x")),
            chat(user("a"), answer(text), user(text)),
            chat(user(parts(text, "y"))),
            {"model": "m", "prompt": text},
            {"model": "m", "prompt": text, "add_special_tokens": False},
        )
    ]


def _turns() -> list[Object]:
    return [
        chat(user("a"), answer("b"), user("c"), answer("d"), user("e")),
        chat(system("one"), system("two"), user("x")),
        chat(system("one"), user("x"), system("two"), user("y")),
        chat(system("d", "developer"), user("x")),
        chat(system(parts("one", "two")), user("x")),
        chat(system(parts("d", "e"), "developer"), user("x")),
        chat(user("a"), user("b")),
        chat(user("a"), answer("b"), answer("c"), user("d")),
        chat(answer("first"), user("x")),
        chat(system("only")),
        chat(system("x-anthropic-billing-header: a\nrest"), user("x")),
    ]


def _endings() -> list[Object]:
    quiet = {"add_generation_prompt": False}
    going_on = {"add_generation_prompt": False, "continue_final_message": True}
    return [
        chat(user("a"), answer("pre")),
        chat(user("a"), answer("pre"), **quiet),
        chat(user("a"), answer("pre"), **going_on),
        chat(user("a"), answer("pre"), continue_final_message=True),
        chat(user("a"), answer(parts("pre", "fix")), **going_on),
        chat(user("a"), **going_on),
        chat(user("a"), **quiet),
        chat(user("w"), truncate_prompt_tokens=3),
    ]


def _tools() -> list[Object]:
    return [
        request
        for tools in (None, [TOOL], [BARE], [STRICT, TOOL], [TOOL | {"defer_loading": True}])
        for request in _with_tools(**({} if tools is None else {"tools": tools}))
    ]


def _with_tools(**more: object) -> list[Object]:
    both = answer(None, tool_calls=[call("aaaaaaaaa"), call("bbbbbbbbb")])
    one = answer(None, tool_calls=[call("aaaaaaaaa")])
    return [
        chat(user("w"), **more),
        chat(system("sys"), user("w"), answer("ok"), user("again"), **more),
        chat(user("w"), tool_choice="none", **more),
        *(
            chat(system("s"), user("w"), answer("", tool_calls=[call(ident)]), result(ident, '{"t":  "20°"}'), **more)
            for ident in ("abcdefghi", "call_abcdefghijkl", "x", "null", "call_ab-cd_ef-gh")
        ),
        *(
            chat(user("w"), answer(content, tool_calls=[call("abcdefghi")]), result("abcdefghi", "r"), **more)
            for content in ("text", "", None, parts("text"))
        ),
        chat(user("w"), both, result("aaaaaaaaa", "1"), result("bbbbbbbbb", "2"), **more),
        chat(user("w"), both, result("bbbbbbbbb", "2"), result("aaaaaaaaa", "1"), answer("d"), user("ok"), **more),
        chat(user("w"), one, result("aaaaaaaaa", parts("one", "two"), name="get_weather"), **more),
        chat(user("w"), one, result("aaaaaaaaa", "x", name="get_weather"), user("more"), **more),
        chat(user("w"), one, result("aaaaaaaaa", "[1,2,  {}]"), answer("x"), user("y"), **more),
    ]


def _arguments() -> list[Object]:
    sent = (
        '{"b":1,"a":"é \\u00e9"}',
        "",
        "{}",
        "[]",
        "not json",
        "null",
        '{"x": NaN}',
        '{"n":1e400,"m":1.0,"k":12345678901234567890}',
        {"obj": 1},
    )
    return [
        chat(user("w"), answer(None, tool_calls=[call("aaaaaaaaa", each)]), result("aaaaaaaaa", "r"), tools=[TOOL])
        for each in sent
    ]


def _reasoning() -> list[Object]:
    fields: tuple[Object, ...] = (
        {"reasoning": "why"},
        {"reasoning_content": "why"},
        {"reasoning": "one", "reasoning_content": "two"},
        {"reasoning": None, "reasoning_content": "w"},
        {"reasoning": ""},
    )
    called = {"tool_calls": [call("aaaaaaaaa")]}
    return [
        *(
            chat(user("w"), answer(content, **each), user("y"))
            for each in fields
            for content in ("x", parts("x"), None)
        ),
        *(chat(user("w"), answer(None, **called, **each), result("aaaaaaaaa", "r"), tools=[TOOL]) for each in fields),
        chat(user("w"), answer([{"type": "thinking", "thinking": "hm", "closed": True}, *parts("x")]), user("y")),
        chat(user("w"), answer([{"type": "thinking", "thinking": "hm"}, *parts("x")]), user("y")),
        chat(system([*parts("sys"), {"type": "thinking", "thinking": "t", "closed": False}, *parts("z")]), user("y")),
        *(chat(user("w"), reasoning_effort=effort) for effort in ("none", "low", "high", "max")),
    ]


def _oddities() -> list[Object]:
    nameless = {"type": "function", "function": {"name": "bad name!", "parameters": {"type": "object"}}}
    return [
        chat(user("w"), answer("x", tool_calls=None), user("y")),
        chat(user("w"), answer("x", tool_calls=[]), user("y")),
        chat(user("w"), documents=[{"title": "t", "text": "d"}]),
        chat(user("w"), chat_template="{{ messages }}"),
        chat(user("w"), add_special_tokens=True),
        chat(user("w") | {"name": "bob"}),
        chat(user(["str part", "two"])),
        chat(user([{"type": "input_text", "text": "x"}])),
        chat(user([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}])),
        chat(user([])),
        chat(user(None)),
        chat(user("w"), answer([{"type": "refusal", "refusal": "no"}]), user("y")),
        chat({"role": "bogus", "content": "w"}),
        chat(user([{"text": "no type"}])),
        chat(user("w"), answer("x", refusal="no"), user("y")),
        chat(result("aaaaaaaaa", "r")),
        chat(user("w"), {"role": "tool", "content": "r"}, tools=[TOOL]),
        chat(user("w"), answer("x", prefix=True), add_generation_prompt=False),
        chat(user("w"), tools=[nameless]),
        chat(user("w"), response_format={"type": "json_object"}),
    ]
