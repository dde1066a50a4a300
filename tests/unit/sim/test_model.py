from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrixinfer.sim.cache import PagedPrefixCache
from matrixinfer.sim.events import AllBlocksCleared, BlockStored
from matrixinfer.sim.model import EngineModel, EngineRequest, StepResult, Timing

TIMING = Timing(step=1.0, prefill_token=0.01, decode_sequence=0.1)


def model(
    *, blocks: int = 1000, size: int = 4, max_tokens: int = 100, max_sequences: int = 8, timing: Timing = TIMING
) -> EngineModel[Any, Any]:
    return EngineModel(PagedPrefixCache(blocks, size), timing, max_tokens=max_tokens, max_sequences=max_sequences)


def request(key: int, prompt: Iterable[int], reply: int = 1) -> EngineRequest:
    return EngineRequest(id=key, prompt=np.array(list(prompt), dtype=np.uint32), reply=range(5000, 5000 + reply))


def drain(engine: EngineModel[Any, Any]) -> list[StepResult]:
    steps = []
    while engine.busy:
        steps.append(engine.step())
        assert len(steps) < 1000
    return steps


def cached(steps: list[StepResult]) -> dict[int, int]:
    return {output.request_id: output.cached_tokens for step in steps for output in step.outputs}


def test_prefill_takes_time_for_each_token_and_decoding_for_each_sequence() -> None:
    engine = model()
    engine.submit(request(1, range(50), reply=3))
    engine.submit(request(2, range(100, 150), reply=3))
    steps = drain(engine)
    assert [step.duration for step in steps] == pytest.approx([1 + 100 * 0.01, 1 + 2 * 0.1, 1 + 2 * 0.1])
    assert [[output.generated for output in step.outputs] for step in steps] == [[1, 1], [2, 2], [3, 3]]
    assert [output.finished for output in steps[-1].outputs] == [True, True]


def test_cached_tokens_take_no_time() -> None:
    engine = model()
    engine.submit(request(1, range(50)))
    drain(engine)
    engine.submit(request(2, range(50)))
    (step,) = drain(engine)
    assert step.outputs[0].cached_tokens == 48
    assert step.duration == pytest.approx(1 + 2 * 0.01)
    assert (engine.stats.prefix_queries, engine.stats.prefix_hits) == (100, 48)


def test_hits_are_reported_as_stored_from_the_root_if_a_request_asks_for_it() -> None:
    engine = model()
    engine.submit(request(1, range(10)))
    (first,) = (event for step in drain(engine) for event in step.events)
    for key, reports in enumerate((False, True)):
        prompt = np.arange(10, dtype=np.uint32)
        engine.submit(EngineRequest(id=key, prompt=prompt, reply=[9], reports_hits=reports))
        assert [event for step in drain(engine) for event in step.events] == ([first] if reports else [])


def test_attention_takes_time_for_each_pair_of_tokens() -> None:
    engine = model(timing=Timing(step=0, prefill_token=0, decode_sequence=0, attention_pair=1))
    engine.submit(request(1, range(10), reply=2))
    assert [step.duration for step in drain(engine)] == [10 * 10 / 2, 10 + 0.5]


def test_a_long_prompt_is_computed_in_chunks_and_stored_chunk_by_chunk() -> None:
    engine = model()
    engine.submit(request(1, range(250)))
    steps = drain(engine)
    assert [len(step.outputs) for step in steps] == [0, 0, 1]
    stored = [event for step in steps for event in step.events if isinstance(event, BlockStored)]
    assert [len(event.token_ids) for event in stored] == [100, 100, 48]
    assert [event.parent_block_hash for event in stored] == [
        None,
        stored[0].block_hashes[-1],
        stored[1].block_hashes[-1],
    ]


def test_running_requests_go_on_while_a_long_prompt_is_computed() -> None:
    engine = model()
    engine.submit(request(1, range(10), reply=5))
    engine.step()
    engine.submit(request(2, range(1000, 1250)))
    steps = drain(engine)
    assert [output.request_id for step in steps[:2] for output in step.outputs] == [1, 1]
    assert steps[0].duration == pytest.approx(1 + 0.1 + 99 * 0.01)


def test_equal_prompts_in_one_step_share_the_first_ones_blocks() -> None:
    engine = model()
    for key in (1, 2, 3):
        engine.submit(request(key, range(18)))
    assert cached(drain(engine)) == {1: 0, 2: 16, 3: 16}


def test_requests_wait_in_order_for_a_place() -> None:
    engine = model(max_sequences=1)
    engine.submit(request(1, range(10), reply=2))
    engine.submit(request(2, range(20, 30)))
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (1, 1)
    assert [[output.request_id for output in step.outputs] for step in drain(engine)] == [[1], [2]]


def test_requests_wait_for_blocks_until_another_ends() -> None:
    engine = model(blocks=11)
    engine.submit(request(1, range(24), reply=2))
    engine.submit(request(2, range(100, 124)))
    assert [output.request_id for output in engine.step().outputs] == [1]
    assert engine.stats.waiting == 1
    assert [output.request_id for step in drain(engine) for output in step.outputs] == [1, 2]


def test_the_latest_arrival_is_preempted_when_blocks_run_out_and_starts_again() -> None:
    engine = model(blocks=11)
    engine.submit(request(1, range(16), reply=20))
    engine.submit(request(2, range(100, 116), reply=20))
    steps = drain(engine)
    outputs = [output for step in steps for output in step.outputs]
    assert engine.stats.preemptions > 0
    for key in (1, 2):
        assert [output.generated for output in outputs if output.request_id == key] == list(range(1, 21))
    assert cached(steps) == {1: 0, 2: 0}
    assert engine.stats.prefix_queries == 32
    assert [output.request_id for output in outputs if output.finished] == [1, 2]


def test_an_aborted_request_leaves_its_blocks_cached_and_gets_no_more_tokens() -> None:
    engine = model()
    engine.submit(request(1, range(40), reply=50))
    engine.submit(request(2, range(100, 900), reply=50))
    engine.step()
    engine.abort(1)
    engine.abort(2)
    engine.abort(3)
    assert not engine.busy
    assert engine.stats.cache_usage == 0
    engine.submit(request(4, range(41)))
    assert cached(drain(engine)) == {4: 40}


def test_a_waiting_request_can_be_aborted() -> None:
    engine = model(max_sequences=1)
    engine.submit(request(1, range(10)))
    engine.submit(request(2, range(10)))
    engine.abort(2)
    assert cached(drain(engine)) == {1: 0}


def test_the_last_generated_token_is_never_computed() -> None:
    engine = model()
    engine.submit(request(1, range(6), reply=2))
    drain(engine)
    engine.submit(request(2, [*range(6), 5000, 5001, 9]))
    assert cached(drain(engine)) == {2: 4}


def test_the_event_of_a_reset_comes_first_in_the_next_step() -> None:
    engine = model()
    engine.submit(request(1, range(10)))
    drain(engine)
    assert engine.reset_prefix_cache()
    assert not engine.busy
    engine.submit(request(2, range(10)))
    (step,) = drain(engine)
    assert step.outputs[0].cached_tokens == 0
    assert isinstance(step.events[0], AllBlocksCleared)
    assert isinstance(step.events[1], BlockStored)


def test_a_reset_is_refused_while_a_request_runs() -> None:
    engine = model()
    engine.submit(request(1, range(10), reply=2))
    engine.step()
    assert not engine.reset_prefix_cache()


def test_usage_is_the_share_of_blocks_that_requests_use() -> None:
    engine = model(blocks=11)
    engine.submit(request(1, range(20), reply=2))
    engine.step()
    assert engine.stats.cache_usage == 0.5
    drain(engine)
    assert engine.stats.cache_usage == 0


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 24), st.integers(1, 12), st.booleans()), min_size=1, max_size=12
    )
)
def test_every_request_gets_its_reply_in_order_unless_aborted(
    arrivals: list[tuple[int, int, int, bool]],
) -> None:
    """An arrival: steps since the previous one, tokens of prompt and reply, whether it is aborted one step later."""
    engine = model(blocks=11, max_tokens=7, max_sequences=3)
    seen: dict[int, list[int]] = {key: [] for key in range(len(arrivals))}
    aborted: set[int] = set()

    def step() -> None:
        for output in engine.step().outputs:
            assert output.request_id not in aborted
            seen[output.request_id].append(output.generated)

    for key, (pause, prompt, reply, abort) in enumerate(arrivals):
        for _ in range(pause):
            step()
        engine.submit(request(key, [token % 3 for token in range(prompt)], reply))
        if abort:
            step()
            engine.abort(key)
            aborted.add(key)
    for _ in range(5000):
        if not engine.busy:
            break
        step()
    assert not engine.busy
    assert engine.stats.cache_usage == 0
    assert engine.reset_prefix_cache()
    for key, (_, _, reply, _) in enumerate(arrivals):
        assert seen[key] == list(range(1, len(seen[key]) + 1))
        assert len(seen[key]) == reply or key in aborted


@pytest.mark.parametrize(("prompt", "reply"), [(0, 1), (1, 0), (30, 11)])
def test_a_request_that_can_never_run_is_refused(prompt: int, reply: int) -> None:
    with pytest.raises(ValueError, match=r"which the cache holds|at least one"):
        model(blocks=11).submit(request(1, range(prompt), reply))
