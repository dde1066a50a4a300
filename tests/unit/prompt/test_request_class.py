from __future__ import annotations

import json
from typing import Any

import pytest

from matrixinfer.prompt.requests import parse

USER = {"role": "user", "content": "x"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", {"prompt": "x"}, "text"),
        ("/v1/completions", {"prompt": [1]}, "text"),
        ("/v1/embeddings", {"input": "x"}, "pooling"),
        ("/v1/chat/completions", {"messages": [USER, {"role": "assistant", "content": "y"}, USER]}, "chat"),
        ("/v1/chat/completions", {"messages": [USER], "tools": TOOLS}, "chat+tools"),
        ("/v1/chat/completions", {"messages": [USER, CALL]}, "chat+tools"),
        ("/v1/chat/completions", {"messages": [USER, {"role": "tool", "content": "y"}]}, "chat+tools"),
        ("/v1/chat/completions", {"messages": [USER], "reasoning_effort": "low"}, "chat+reasoning"),
        ("/v1/chat/completions", {"messages": [USER], "reasoning": {"enabled": True}}, "chat+reasoning"),
        ("/v1/chat/completions", {"messages": [USER], "chat_template_kwargs": {"a": 1}}, "chat+reasoning"),
        (
            "/v1/chat/completions",
            {"messages": [USER, {"role": "assistant", "content": "y", "reasoning_content": "z"}]},
            "chat+reasoning",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": []}]}, "chat+parts"),
        ("/v1/chat/completions", {"messages": [USER], "documents": [{}]}, "chat+other"),
        ("/v1/chat/completions", {"messages": [{"role": "developer", "content": "x"}]}, "chat+other"),
        ("/v1/chat/completions", {"messages": [USER], "chat_template": "x"}, "chat+other"),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": []}],
                "tools": TOOLS,
                "reasoning_effort": "low",
                "continue_final_message": True,
            },
            "chat+tools+reasoning+parts+other",
        ),
        ("/v1/messages", {"messages": [USER]}, "messages"),
        ("/v1/messages", {"messages": [USER], "thinking": {"type": "disabled"}}, "messages+reasoning"),
        ("/v1/responses", {"input": "x", "reasoning": {"effort": "low"}}, "responses+reasoning"),
    ],
)
def test_the_class_of_a_request(path: str, body: dict[str, Any], expected: str) -> None:
    assert parse(path, json.dumps({"model": "m"} | body).encode()).request_class == expected
