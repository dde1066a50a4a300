from __future__ import annotations

import subprocess
import sys

import pytest

from matrixinfer.testing import FakeClock, FakeEngine, candidate, request, services


def test_a_fake_clock_moves_when_advanced_and_never_back() -> None:
    clock = FakeClock(5.0)
    clock.advance(2.5)
    assert clock() == 7.5
    with pytest.raises(ValueError, match="expected a number that is not negative, got -1"):
        clock.advance(-1)


def test_builders_take_any_field() -> None:
    assert candidate().name == "pod-a"
    assert candidate("x", running=3).url == "http://x:8000"
    assert request(model="m").model == "m"
    assert len(request().chain) * request().block_size == request().prompt_tokens
    clock = FakeClock()
    made = services(clock, seed=1)
    clock.advance(1)
    assert (made.clock(), made.rng.random()) == (1.0, services(seed=1).rng.random())


def test_a_fake_engine_numbers_its_frames_and_begins_again_after_a_restart() -> None:
    engine = FakeEngine()
    prompt = list(range(40))
    assert [engine.store(prompt)[0], engine.evict(prompt, keep=1)[0], engine.store(prompt)[0]] == [0, 1, 2]
    assert [engine.held(prompt), engine.held(prompt, salt="s")] == [2, 0]
    assert engine.since(1) == engine.frames[1:]
    engine.restart()
    assert (engine.since(0), engine.held(prompt), engine.clear()[0]) == ([], 0, 0)


def test_without_hypothesis_the_suites_say_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; from matrixinfer.testing import PluginConformance"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.rstrip().endswith(
        "PluginConformance needs hypothesis: pip install 'matrixinfer-gateway[testing]'"
    )
