from __future__ import annotations

import msgspec
import pytest

from matrixinfer.prompt.requests import parse
from matrixinfer.prompt.samples import OPTIONAL, SAMPLED_CLASSES, SAMPLES, SampleFacts
from matrixinfer.prompt.source import Checked, Source

TEXT = SampleFacts(name="a text", compared=True)
CHAT = SampleFacts(name="a chat", compared=True)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (CHAT, Checked()),
        (SampleFacts(name="a chat"), Checked()),  # it is the engine's own
        (
            SampleFacts(name="a text", compared=True, first_difference=3),
            Checked(refused="a text differs from the token ids of pod from token 3 on"),
        ),
        (
            SampleFacts(name="a chat", compared=True, first_difference=0),
            Checked(chats="a chat differs from the token ids of pod from token 0 on"),
        ),
        (
            SampleFacts(name="a chat", engine_error="timeout"),
            Checked(chats="a chat could not be compared with pod: timeout", again=True),
        ),
        (
            SampleFacts(name="a text", engine_error="timeout"),
            Checked(unanswered="a text could not be compared with pod: timeout", again=True),
        ),
        (
            SampleFacts(name="a chat", engine_error="400", refused=True),
            Checked(chats="a chat could not be compared with pod: 400"),
        ),
        (
            SampleFacts(name="a chat", gateway_error="no template"),
            Checked(chats="a chat cannot be tokenized: no template"),
        ),
        (SampleFacts(name=OPTIONAL, optional=True, gateway_error="x", engine_error="400", refused=True), Checked()),
        (
            SampleFacts(name=OPTIONAL, optional=True, gateway_error="x", engine_error="500"),
            Checked(chats=f"{OPTIONAL} could not be compared with pod: 500", again=True),
        ),
    ],
)
def test_what_a_sample_shows(sample: SampleFacts, expected: Checked) -> None:
    assert Checked.of("pod", [TEXT, sample]) == expected


def test_one_engine_that_differs_decides_for_all() -> None:
    assert Checked.all([Checked(), Checked(chats="c"), Checked(refused="r")]) == Checked(refused="r", chats="c")
    assert Checked.all([]) == Checked()


def test_chats_come_from_the_engine_if_all_prompts_do() -> None:
    assert Source(kind="asked").view()["chats"] == "asked"
    assert Source(kind="found", asks_for_chats=True).view()["chats"] == "asked"
    assert Source(kind="found").view()["chats"] == "found"


def test_the_samples_are_of_the_classes_that_they_stand_for() -> None:
    classes = [
        parse(path, msgspec.json.encode({"model": "m", **body})).request_class for path, body in SAMPLES.values()
    ]
    assert tuple(dict.fromkeys(each for each in classes if "parts" not in each)) == SAMPLED_CLASSES
    assert {each for each in classes if "parts" in each} == {"chat+parts", "chat+tools+parts"}
    assert SampleFacts(name=list(SAMPLES)[-1]).is_chat
