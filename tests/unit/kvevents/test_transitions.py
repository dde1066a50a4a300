"""Every pair of a state and an input is decided: it is in the table, ignored, or impossible."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import product

import pytest

from matrixinfer.kvevents.cursor import Source, Verdict
from matrixinfer.kvevents.feed import FeedStats
from matrixinfer.kvevents.states import COUNTED, VERDICTS, Action, Fate, Input, Knowledge, Phase
from matrixinfer.kvevents.transitions import LIVE_ONLY, WITH_REPLAY, ImpossibleInput, Tables

FOLLOWING, CATCHING_UP, ASKED = Phase.FOLLOWING, Phase.CATCHING_UP, Phase.ASKED
RECEIVING, PROVING, DISCONNECTED = Phase.RECEIVING, Phase.PROVING, Phase.DISCONNECTED
REPLAYING = (ASKED, RECEIVING, PROVING)
NOT_TAKING = (*REPLAYING, DISCONNECTED)
NOT_REPLAYING = (FOLLOWING, CATCHING_UP, DISCONNECTED)
UNTRUSTED = (Knowledge.UNTRUSTED, Knowledge.UNTRUSTED_GIVEN_UP)
GIVEN_UP = (Knowledge.GIVEN_UP, Knowledge.UNTRUSTED_GIVEN_UP)

IMPOSSIBLE: Mapping[Input, Iterable[Phase]] = {
    # The cursor judges live frames only while they are taken, and replayed ones only while a replay is.
    Input.LIVE_NEXT: NOT_TAKING,
    Input.LIVE_DUPLICATE: NOT_TAKING,
    Input.LIVE_GAP: NOT_TAKING,
    Input.LIVE_RESTART: NOT_TAKING,
    Input.REPLAY_NEXT: (*NOT_REPLAYING, PROVING),  # until the engine is proven, the next frame is called truncated
    Input.REPLAY_DUPLICATE: (*NOT_REPLAYING, RECEIVING),  # a replay that has brought something is proven
    Input.REPLAY_PROOF: NOT_REPLAYING,
    Input.REPLAY_GAP: (*NOT_REPLAYING, PROVING),
    Input.REPLAY_RESTART: NOT_REPLAYING,
    Input.REPLAY_TRUNCATED: (*NOT_REPLAYING, RECEIVING),
    # Frames are held only behind others or for a replay.
    Input.HELD_DUPLICATE: (FOLLOWING, DISCONNECTED),
    Input.HELD_RESTART: (FOLLOWING, DISCONNECTED),
    Input.HELD_TOO_MANY: (FOLLOWING, DISCONNECTED),
    Input.HELD_NONE_LEFT: (FOLLOWING, *NOT_TAKING),
    # A replay that proves nothing is of another engine; one that has brought something is proven and not empty.
    Input.REPLAY_ENDED: (PROVING,),
    Input.REPLAY_ENDED_CONTINUED: (PROVING,),
    Input.REPLAY_ENDED_EMPTY: (RECEIVING, PROVING),
    Input.REPLAY_ENDED_UNPROVEN: (RECEIVING,),
    # Only frames that are applied are read.
    Input.FIRST_LIVE: NOT_TAKING,
    Input.FIRST_REPLAYED: (*NOT_REPLAYING, ASKED, PROVING),
    Input.CLEARED: (ASKED, PROVING, DISCONNECTED),
    Input.MALFORMED: (ASKED, PROVING, DISCONNECTED),
    Input.UNREADABLE: (ASKED, PROVING, DISCONNECTED),
    Input.UNREADABLE_STORED: (ASKED, PROVING, DISCONNECTED),
    Input.DISTRUSTED: (ASKED, PROVING, DISCONNECTED),
    # Replays have a position, and those that prove or bring something are past the start.
    Input.RECONNECTED_AT_START: (RECEIVING, PROVING),
    Input.RECONNECTED_ASTRAY: REPLAYING,
}
LIVE_ONLY_IMPOSSIBLE: Mapping[Input, Iterable[Phase]] = {
    **{given: (FOLLOWING, DISCONNECTED) for given in Input if given.name.startswith(("HELD", "REPLAY_"))},
    **dict.fromkeys(
        (
            Input.REPLAY_ENDED,
            Input.REPLAY_ENDED_CONTINUED,
            Input.REPLAY_ENDED_EMPTY,
            Input.REPLAY_ENDED_UNPROVEN,
            Input.REPLAY_BROKE_OFF,
            Input.REPLAY_FAILED,
        ),
        (),  # an answer that nobody waits for is ignored
    ),
    **dict.fromkeys(
        (
            Input.LIVE_NEXT,
            Input.LIVE_DUPLICATE,
            Input.LIVE_GAP,
            Input.LIVE_RESTART,
            Input.FIRST_LIVE,
            Input.CLEARED,
            Input.MALFORMED,
            Input.UNREADABLE,
            Input.UNREADABLE_STORED,
            Input.DISTRUSTED,
        ),
        (DISCONNECTED,),
    ),
    Input.FIRST_REPLAYED: (FOLLOWING, DISCONNECTED),
    Input.RECONNECTED_AT_START: (FOLLOWING, DISCONNECTED),  # whatever comes first is a beginning: there is no start
}
READ = (Input.CLEARED, Input.MALFORMED, Input.UNREADABLE, Input.UNREADABLE_STORED, Input.DISTRUSTED)
IMPOSSIBLE_KNOWLEDGE: Mapping[Input, Iterable[Knowledge]] = {
    **dict.fromkeys(READ, UNTRUSTED),  # frames of an engine that is not trusted are not read
    Input.CLEARED: (*UNTRUSTED, Knowledge.WHOLE),  # a clear brings nothing new
    **dict.fromkeys((Input.FIRST_REPLAYED, Input.REPLAY_ENDED_EMPTY), GIVEN_UP),  # giving up loses the first position
    Input.RECONNECTED_ASTRAY: (Knowledge.WHOLE,),  # the position is lost with some of the frames
}

KINDS = pytest.mark.parametrize(
    ("tables", "phases", "impossible"),
    [
        pytest.param(WITH_REPLAY, tuple(Phase), IMPOSSIBLE, id="with replay"),
        pytest.param(LIVE_ONLY, (FOLLOWING, DISCONNECTED), LIVE_ONLY_IMPOSSIBLE, id="live only"),
    ],
)


@KINDS
def test_every_input_in_every_phase_is_decided_once(
    tables: Tables, phases: Iterable[Phase], impossible: Mapping[Input, Iterable[Phase]]
) -> None:
    for phase, given in product(phases, Input):
        ways = [(phase, given) in tables.phases, (phase, given) in tables.ignored, phase in impossible.get(given, ())]
        assert ways.count(True) == 1, (phase, given, ways)
    assert {phase for phase, _ in (*tables.phases, *tables.ignored)} == set(phases)


@KINDS
def test_an_impossible_input_raises_and_an_ignored_one_changes_nothing(
    tables: Tables, phases: Iterable[Phase], impossible: Mapping[Input, Iterable[Phase]]
) -> None:
    for phase, given in product(phases, Input):
        if phase in impossible.get(given, ()):
            with pytest.raises(ImpossibleInput, match=f"{phase.value} met: {given.value}"):
                tables.step(phase, Knowledge.PARTIAL, given)
        elif (phase, given) in tables.ignored:
            assert tables.step(phase, Knowledge.PARTIAL, given) is None


@pytest.mark.parametrize(
    ("tables", "unused"),
    [pytest.param(WITH_REPLAY, (), id="with replay"), pytest.param(LIVE_ONLY, GIVEN_UP, id="live only")],
)
def test_every_input_in_every_knowledge_is_decided(tables: Tables, unused: Iterable[Knowledge]) -> None:
    for knowledge, given in product(Knowledge, Input):
        possible = knowledge not in unused and knowledge not in IMPOSSIBLE_KNOWLEDGE.get(given, ())
        assert given in tables.neutral or possible == ((knowledge, given) in tables.knowledge), (knowledge, given)


def test_an_input_that_cannot_occur_in_a_knowledge_raises() -> None:
    with pytest.raises(ImpossibleInput, match="untrusted met: malformed"):
        WITH_REPLAY.step(FOLLOWING, Knowledge.UNTRUSTED, Input.MALFORMED)


@pytest.mark.parametrize(
    ("tables", "start", "phases", "unused"),
    [
        pytest.param(WITH_REPLAY, (ASKED, Knowledge.WHOLE), set(Phase), (), id="with replay"),
        pytest.param(LIVE_ONLY, (FOLLOWING, Knowledge.PARTIAL), {FOLLOWING, DISCONNECTED}, GIVEN_UP, id="live only"),
    ],
)
def test_the_tables_lead_to_every_state_and_to_no_other(
    tables: Tables, start: tuple[Phase, Knowledge], phases: set[Phase], unused: Iterable[Knowledge]
) -> None:
    reached = {start}
    pending = [start]
    while pending:
        for following in _following(tables, *pending.pop()):
            if following not in reached:
                reached.add(following)
                pending.append(following)
    assert {phase for phase, _ in reached} == phases
    assert {knowledge for _, knowledge in reached} == set(Knowledge) - set(unused)


def _following(tables: Tables, phase: Phase, knowledge: Knowledge) -> Iterator[tuple[Phase, Knowledge]]:
    for given in Input:
        try:
            step = tables.step(phase, knowledge, given)
        except ImpossibleInput:
            continue
        if step is not None:
            yield step.phase, step.knowledge


@pytest.mark.parametrize("tables", [WITH_REPLAY, LIVE_ONLY], ids=["with replay", "live only"])
def test_whoever_asks_for_a_replay_waits_for_it(tables: Tables) -> None:
    for transition in tables.phases.values():
        if Action.ASK in transition.actions:
            assert transition.phase in (ASKED, PROVING)


@pytest.mark.parametrize("tables", [WITH_REPLAY, LIVE_ONLY], ids=["with replay", "live only"])
def test_a_frame_is_held_only_where_it_gets_its_turn(tables: Tables) -> None:
    for transition in tables.phases.values():
        if transition.fate in (Fate.HOLD, Fate.PUT_BACK):
            assert transition.phase in (CATCHING_UP, *REPLAYING)


def test_every_verdict_of_the_cursor_is_an_input() -> None:
    assert set(product(Source, Verdict)) - set(VERDICTS) == {(Source.LIVE, Verdict.TRUNCATED)}


def test_inputs_are_counted_under_names_that_exist() -> None:
    assert {name for names in COUNTED.values() for name in names} <= {field.name for field in fields(FeedStats)}
