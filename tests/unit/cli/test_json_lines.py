"""`matrixinfer render` and `matrixinfer tokenize`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matrixinfer.cli import main
from matrixinfer.prompt.local import LocalTokenizer
from tests.unit.prompt.support import folder, tokenizer

USER = {"role": "user", "content": "hi"}
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Runs a command with these lines on standard input, and returns its answers."""

    def run(*arguments: str, lines: list[Any], code: int = 0) -> list[dict[str, Any]]:
        sent = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sent)))
        assert main(arguments) == code
        return [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", tokenizer(bos=True), bos_token="<s>")


def template(path: Path, source: str) -> str:
    file = path / "template.jinja"
    file.write_text(source, encoding="utf-8")
    return str(file)


def test_conversations_are_rendered_line_by_line(run: Run, tmp_path: Path) -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ tools | length if tools }}{{ mood }}{% if add_generation_prompt %}>{% endif %}"
    answers = run(
        "render",
        "--chat-template",
        template(tmp_path, source),
        lines=[
            {"messages": [USER], "tools": None, "add_generation_prompt": True, "kwargs": {}},
            {"messages": [USER, USER], "tools": [{}], "add_generation_prompt": False, "kwargs": {"mood": "ü"}},
            b"",
            {"messages": [USER]},
        ],
    )
    assert answers == [{"rendered": "[hi]>"}, {"rendered": "[hi][hi]1ü"}, {"rendered": "[hi]>"}]


def test_a_line_that_cannot_be_rendered_gets_an_error(run: Run, tmp_path: Path) -> None:
    source = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}"
    answers = run(
        "render",
        "--chat-template",
        template(tmp_path, source),
        lines=[
            {"messages": [USER, USER]},
            b"{not json",
            b"\xff",
            {"tools": []},
            {"messages": [USER], "colour": 1},
            {"messages": [USER], "kwargs": {"tools": []}},
            {"messages": [USER]},
        ],
    )
    assert [set(answer) for answer in answers] == [{"error"}] * 6 + [{"rendered"}]
    assert "one at a time" in answers[0]["error"]
    assert "`messages` is required" in answers[3]["error"]


def test_all_arguments_of_a_rendering_reach_it(run: Run, model: Path, tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}{{ documents[0].text }}{{ messages[-1].content }}"
    (answer, continued) = run(
        *("render", "--chat-template", template(tmp_path, source), "--tokenizer", str(model), "--now", "2031-02-03"),
        lines=[
            {"messages": [USER], "documents": [{"text": "d"}]},
            {
                "messages": [USER, {"role": "assistant", "content": "so "}],
                "add_generation_prompt": False,
                "continue_final_message": True,
                "kwargs": {"documents": [{"text": "e"}], "bos_token": "<t>"},
            },
        ],
    )
    assert answer == {"rendered": "<s>2031-02-03dhi"}
    assert continued == {"rendered": "<t>2031-02-03eso "}


def test_the_built_in_template_has_a_name(run: Run) -> None:
    (answer,) = run("render", "--chat-template", "chatml", lines=[{"messages": [USER]}])
    assert answer == {"rendered": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}


@pytest.mark.parametrize("arguments", [("--chat-template", "absent.jinja"), ("--chat-template", "chatml", "absent")])
def test_a_missing_file_ends_the_command(run: Run, arguments: tuple[str, ...]) -> None:
    assert run("render", *arguments, lines=[], code=2) == []


def test_a_template_that_does_not_compile_ends_the_command(run: Run, tmp_path: Path) -> None:
    assert run("render", "--chat-template", template(tmp_path, "{% if %}"), lines=[{"messages": []}], code=2) == []


def test_requests_are_tokenized_line_by_line(run: Run, model: Path) -> None:
    local = LocalTokenizer.load(model, "chatml")
    chat = local.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).tolist()
    plain = local.encode("hi", add_special_tokens=True).tolist()
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    answers = run(
        *("tokenize", "--tokenizer", str(model), "--chat-template", "chatml"),
        lines=[
            {"model": "m", "messages": [USER]},
            {"messages": [USER]},
            {"prompt": "hi"},
            {"prompt": ["hi", "there"]},
            {"prompt": [5, 6, 7], "truncate_prompt_tokens": 2},
            {"prompt": "hi", "add_special_tokens": False},
            {"messages": [USER, image]},
        ],
    )
    assert [answer["tokens"] for answer in answers[:6]] == [chat, chat, plain, plain, [6, 7], plain[1:]]
    assert answers[6]["complete"] is False
    assert chat[: len(answers[6]["tokens"])] == answers[6]["tokens"]


def test_a_body_that_cannot_be_tokenized_gets_an_error(run: Run, model: Path) -> None:
    answers = run(
        *("tokenize", "--tokenizer", str(model)),
        lines=[
            b"{",
            {"messages": []},
            {"colour": 1},
            {"messages": [USER]},
            {"prompt": "a", "suffix": "b"},
            {"prompt": "a"},
        ],
    )
    assert [set(answer) for answer in answers] == [{"error"}] * 5 + [{"tokens"}]
    assert "--path" in answers[2]["error"]
    assert "chat template" in answers[3]["error"]


def test_the_path_selects_the_api(run: Run, model: Path) -> None:
    arguments = ("tokenize", "--tokenizer", str(model), "--path", "/v1/embeddings")
    (answer,) = run(*arguments, lines=[{"input": "hi"}])
    assert answer["tokens"] == LocalTokenizer.load(model, None).encode("hi", add_special_tokens=True).tolist()


def test_a_folder_without_a_vocabulary_ends_the_command(run: Run, tmp_path: Path) -> None:
    assert run("tokenize", "--tokenizer", str(tmp_path), lines=[{"prompt": "a"}], code=2) == []
