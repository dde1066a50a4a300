"""The fit of an engine's times, the plan of what is sent, and the preset that comes out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from matrixinfer.errors import ConfigError
from matrixinfer.study.calibration.fit import CalibrationError, Decode, Prefill, fit
from matrixinfer.study.calibration.measure import between_tokens
from matrixinfer.study.calibration.plan import Limits, plan
from matrixinfer.study.calibration.preset import preset_of, yaml_of
from matrixinfer.study.presets import Times, preset

TRUE = Times(step=0.01, prefill_token=9e-5, decode_sequence=1e-4, attention_pair=1.7e-9, decode_context=2.5e-8)
MAX_TOKENS = 2048


def prefill(tokens: int, times: Times = TRUE, overhead: float = 0.002) -> Prefill:
    steps = -(-tokens // MAX_TOKENS)
    pairs = tokens * tokens / 2
    seconds = overhead + steps * times.step + tokens * times.prefill_token + pairs * times.attention_pair
    return Prefill(tokens=tokens, seconds=seconds)


def decode(batch: int, prompt: int, times: Times = TRUE) -> Decode:
    context = batch * prompt
    per_context = times.attention_pair + times.decode_context
    return Decode(
        batch=batch, context=context, seconds=times.step + batch * times.decode_sequence + context * per_context
    )


def measured(times: Times = TRUE) -> tuple[list[Prefill], list[Decode]]:
    prefills = [prefill(tokens, times) for tokens in (64, 512, 1024, 2048, 4096, 8192) for _ in range(4)]
    return prefills, [decode(batch, prompt, times) for batch in (1, 2, 4, 8, 16, 32) for prompt in (64, 2000)]


def test_exact_measurements_give_back_every_term() -> None:
    found = fit(*measured(), max_tokens=MAX_TOKENS)
    for name in ("step", "prefill_token", "decode_sequence", "attention_pair", "decode_context"):
        assert getattr(found.times, name) == pytest.approx(getattr(TRUE, name), rel=0.01), name
    assert found.overhead == pytest.approx(0.002, rel=0.01)
    assert found.worst_error < 0.001


def test_a_term_that_an_engine_does_not_have_is_left_out_and_none_is_negative() -> None:
    flat = Times(step=0.01, prefill_token=9e-5, decode_sequence=0.0, attention_pair=0.0, decode_context=0.0)
    found = fit(*measured(flat), max_tokens=MAX_TOKENS).times
    assert found.step == pytest.approx(0.01, rel=0.01)
    assert found.decode_sequence < 1e-7
    shrinking = [Prefill(tokens=tokens, seconds=0.1 - tokens * 1e-6) for tokens in (64, 512, 1024)]
    assert fit(shrinking, measured()[1], max_tokens=MAX_TOKENS).times.prefill_token >= 0


def test_disturbed_measurements_do_not_mislead_it() -> None:
    draw = random.Random(3)
    prefills, decodes = measured()
    noisy = [Prefill(tokens=each.tokens, seconds=each.seconds + draw.expovariate(200)) for each in prefills]
    slower = [
        Decode(batch=each.batch, context=each.context, seconds=each.seconds * draw.uniform(1, 1.04)) for each in decodes
    ]
    found = fit(noisy, slower, max_tokens=MAX_TOKENS).times
    assert found.step == pytest.approx(TRUE.step, rel=0.1)
    assert found.prefill_token == pytest.approx(TRUE.prefill_token, rel=0.1)


@pytest.mark.parametrize(("lengths", "batches"), [((64, 512), (1, 2)), ((64, 512, 1024), (1,)), ((), ())])
def test_too_few_measurements_are_no_fit(lengths: Sequence[int], batches: Sequence[int]) -> None:
    with pytest.raises(CalibrationError, match="too little was measured"):
        fit([prefill(tokens) for tokens in lengths], [decode(batch, 64) for batch in batches], max_tokens=MAX_TOKENS)


def test_a_plan_stays_within_what_the_engine_takes() -> None:
    limits = Limits(context=4096, cache_tokens=10_000, max_sequences=16)
    planned = plan(limits)
    assert max(task.prompt + task.reply for task in planned.tasks) <= limits.context
    assert all(task.requests * (task.prompt + task.reply) <= 8_000 for task in planned.tasks)
    assert planned.together == 16
    assert planned.requests < 200
    assert [task.requests for task in planned.tasks[:2]] == [1, 1]
    assert planned.tasks[0].reply > 1
    assert planned.tasks[1].reply == 1
    assert max(task.prompt for task in plan(limits, longest=1024).tasks) == 1024
    assert plan(limits, most_together=2).together == 2
    with pytest.raises(CalibrationError, match="takes prompts of 512 tokens"):
        plan(Limits(context=400, cache_tokens=None, max_sequences=8))


def test_the_pace_is_that_of_the_time_in_which_all_generate() -> None:
    first = [(0.0, 1), (1.0, 2), *((1.0 + 0.1 * number, 2 + number) for number in range(1, 11))]
    second = [(1.0 + 0.1 * number, 1 + number) for number in range(21)]
    decode = between_tokens([first, second], prompt=100)
    assert decode is not None
    assert decode.batch == 2
    assert decode.seconds == pytest.approx(0.1)
    assert decode.context == 200 + round((2 + 12) / 2 + (1 + 11) / 2)
    assert between_tokens([first, second[-2:]], prompt=100) is None


def test_what_is_written_is_an_engine_for_replays(tmp_path: Path) -> None:
    found = fit(*measured(), max_tokens=MAX_TOKENS)
    made = preset_of(
        found,
        model="org/Model-7B",
        url="http://e:8000",
        when="2026-01-02",
        block_size=16,
        kv_tokens=1000,
        max_tokens=MAX_TOKENS,
        max_sequences=8,
        notes={"max_tokens": "given"},
    )
    file = tmp_path / "engine.yaml"
    file.write_text(yaml_of(made, model="org/Model-7B"))
    assert file.read_text().startswith("org-model-7b:\n")
    assert preset(str(file)) == made
    assert preset(str(file)).shape(16).timing.step == found.times.step


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: 1", "cannot read a preset"), ("{}", "expected one preset"), ("a: [", "cannot read"), (None, "cannot read")],
)
def test_a_file_that_is_no_preset_is_explained(text: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        preset(str(file))
