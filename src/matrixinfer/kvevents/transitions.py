"""What changes the states of a feed, as data.

A feed has two states at a time. Its `Phase` says what happens to frames, its `Knowledge` how much of the engine's cache
the frames so far account for. Every `Input` is looked up in two tables: the one of phases gives the next phase, the
actions of the feed and the fate of the frame at hand; the one of knowledge gives the next knowledge. A feed of an
engine without a replay endpoint has only two phases, and tables of its own.

For every pair of a phase and an input exactly one of these holds:

- the table has an entry;
- the pair is ignored: the input is an answer that comes too late, or a frame that nobody waits for;
- the pair is impossible: no sequence of calls leads there, and `Tables.step` raises `ImpossibleInput`.

Where one call can mean several things, the feed asks its cursor and its queue and picks the input accordingly: the
variants of `REPLAY_ENDED` are one call, and so are those of `RECONNECTED`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from matrixinfer.errors import MatrixInferError
from matrixinfer.kvevents.states import COUNTED, Action, Fate, Input, Knowledge, Phase


class Transition(NamedTuple):
    """One entry of the table of phases."""

    phase: Phase
    actions: tuple[Action, ...] = ()
    fate: Fate = Fate.DROP


class Step(NamedTuple):
    """What follows from an input in a phase and a knowledge."""

    phase: Phase
    knowledge: Knowledge
    counted: tuple[str, ...]
    """The fields of `FeedStats` that count it."""
    actions: tuple[Action, ...]
    fate: Fate


class ImpossibleInput(MatrixInferError):
    """A feed met an input that cannot occur in its state: an error in this program."""

    def __init__(self, state: Enum, given: Input) -> None:
        super().__init__(f"a feed that is {state.value} met: {given.value}")


_Row: TypeAlias = tuple[Input, Iterable[Phase], Phase | None, tuple[Action, ...], Fate]
_FOLLOWING, _CATCHING_UP, _ASKED = Phase.FOLLOWING, Phase.CATCHING_UP, Phase.ASKED
_RECEIVING, _PROVING, _DISCONNECTED = Phase.RECEIVING, Phase.PROVING, Phase.DISCONNECTED
_TAKING = (_FOLLOWING, _CATCHING_UP)
_REPLAYING = (_ASKED, _RECEIVING, _PROVING)
_HOLDING = (_CATCHING_UP, *_REPLAYING)
_APPLYING = (*_TAKING, _RECEIVING)
_ASTRAY = (*_TAKING, _DISCONNECTED)
_AT_START = (*_ASTRAY, _ASKED)
_ALL = tuple(Phase)
_SAME = None
_ASK, _VOID, _CLEAR, _RESET = Action.ASK, Action.VOID, Action.CLEAR, Action.RESET
_LOSE, _REWIND, _ANSWERED, _MISSED = Action.LOSE, Action.REWIND, Action.ANSWERED, Action.MISSED
_DROP, _JUDGE, _APPLY, _HOLD, _PUT_BACK = Fate.DROP, Fate.JUDGE, Fate.APPLY, Fate.HOLD, Fate.PUT_BACK
_FROM_START = (_VOID, _ANSWERED, _RESET, _REWIND, _ASK)
_OVER = (_VOID, _ANSWERED, Action.START_OVER, _REWIND, _ASK)
_OVER_ANYWHERE = (_VOID, _ANSWERED, Action.START_OVER, _LOSE)
_FROM_ANYWHERE = (_VOID, _ANSWERED, _RESET, _LOSE)

# fmt: off
_ROWS: tuple[_Row, ...] = (
    # input                        in these phases          next          actions                 the frame
    (Input.LIVE_FRAME,             (_FOLLOWING,),           _SAME,        (),                     _JUDGE),
    (Input.LIVE_FRAME,             _HOLDING,                _SAME,        (),                     _HOLD),
    (Input.REPLAYED_FRAME,         _REPLAYING,              _SAME,        (),                     _JUDGE),

    (Input.LIVE_NEXT,              _TAKING,                 _SAME,        (),                     _APPLY),
    (Input.LIVE_DUPLICATE,         _TAKING,                 _SAME,        (),                     _DROP),
    (Input.LIVE_GAP,               _TAKING,                 _ASKED,       (_ASK,),                _PUT_BACK),
    # The replay brings the frame once more, or the frame is older than everything that the engine still has.
    (Input.LIVE_RESTART,           _TAKING,                 _ASKED,       _FROM_START,            _DROP),

    (Input.HELD_DUPLICATE,         _HOLDING,                _SAME,        (),                     _DROP),
    (Input.HELD_RESTART,           _HOLDING,                _ASKED,       _FROM_START,            _HOLD),
    (Input.HELD_TOO_MANY,          _HOLDING,                _FOLLOWING,   (_VOID, _CLEAR, _LOSE), _DROP),
    (Input.HELD_NONE_LEFT,         (_CATCHING_UP,),         _FOLLOWING,   (),                     _DROP),

    (Input.REPLAY_NEXT,            (_ASKED, _RECEIVING),    _RECEIVING,   (),                     _APPLY),
    (Input.REPLAY_DUPLICATE,       (_ASKED, _PROVING),      _SAME,        (),                     _DROP),
    (Input.REPLAY_PROOF,           (_ASKED, _PROVING),      _ASKED,       (),                     _DROP),
    (Input.REPLAY_PROOF,           (_RECEIVING,),           _RECEIVING,   (),                     _DROP),
    (Input.REPLAY_GAP,             (_ASKED, _RECEIVING),    _ASKED,       (_ASK,),                _DROP),
    (Input.REPLAY_RESTART,         _REPLAYING,              _ASKED,       _FROM_START,            _DROP),
    (Input.REPLAY_TRUNCATED,       (_ASKED, _PROVING),      _ASKED,       (_CLEAR, _LOSE),        _JUDGE),

    (Input.REPLAY_ENDED,           (_ASKED,),               _CATCHING_UP, (),                     _DROP),
    (Input.REPLAY_ENDED,           (_RECEIVING,),           _ASKED,       (_ASK,),                _DROP),
    (Input.REPLAY_ENDED_CONTINUED, (_ASKED, _RECEIVING),    _CATCHING_UP, (),                     _DROP),
    (Input.REPLAY_ENDED_EMPTY,     (_ASKED,),               _CATCHING_UP, (),                     _DROP),
    (Input.REPLAY_ENDED_UNPROVEN,  (_ASKED, _PROVING),      _ASKED,       _FROM_START,            _DROP),
    (Input.REPLAY_BROKE_OFF,       (_ASKED, _RECEIVING),    _ASKED,       (_ASK,),                _DROP),
    (Input.REPLAY_BROKE_OFF,       (_PROVING,),             _PROVING,     (_ASK,),                _DROP),
    (Input.REPLAY_FAILED,          _REPLAYING,              _CATCHING_UP, (_CLEAR, _LOSE),        _DROP),

    (Input.FIRST_LIVE,             _TAKING,                 _SAME,        (),                     _DROP),
    (Input.FIRST_REPLAYED,         (_RECEIVING,),           _SAME,        (),                     _DROP),
    (Input.CLEARED,                _APPLYING,               _SAME,        (),                     _DROP),
    (Input.MALFORMED,              _APPLYING,               _SAME,        (_CLEAR,),              _DROP),
    (Input.UNREADABLE,             _APPLYING,               _SAME,        (_CLEAR,),              _DROP),
    (Input.UNREADABLE_STORED,      _APPLYING,               _SAME,        (),                     _DROP),
    (Input.DISTRUSTED,             _APPLYING,               _SAME,        (_CLEAR,),              _DROP),
    (Input.FAILED_TO_APPLY,        _ALL,                    _SAME,        (_CLEAR,),              _DROP),

    (Input.HEARTBEAT_CONFIRMED,    (_FOLLOWING,),           _SAME,        (_ANSWERED,),           _DROP),
    (Input.HEARTBEAT_BEHIND,       (_FOLLOWING,),           _ASKED,       (_ANSWERED, _ASK),      _DROP),
    (Input.HEARTBEAT_MISSED,       _ALL,                    _SAME,        (_MISSED,),             _DROP),

    (Input.DISCONNECTED,           _ALL,                    _DISCONNECTED, (_VOID,),              _DROP),
    (Input.RECONNECTED,            _ALL,                    _PROVING,     (_VOID, _ASK),          _DROP),
    (Input.RECONNECTED_AT_START,   _AT_START,               _ASKED,       (_VOID, _ASK),          _DROP),
    (Input.RECONNECTED_ASTRAY,     _ASTRAY,                 _ASKED,       _FROM_START,            _DROP),
    (Input.STARTED_OVER,           _ALL,                    _ASKED,       _OVER,                  _DROP),
    (Input.PURGED,                 _ALL,                    _FOLLOWING,   (_VOID, _CLEAR, _LOSE), _DROP),
)

_LIVE_ONLY_PHASES = (_FOLLOWING, _DISCONNECTED)
_LIVE_ONLY_ROWS: tuple[_Row, ...] = (
    (Input.LIVE_FRAME,             (_FOLLOWING,),           _SAME,        (),                     _JUDGE),
    (Input.LIVE_NEXT,              (_FOLLOWING,),           _SAME,        (),                     _APPLY),
    (Input.LIVE_DUPLICATE,         (_FOLLOWING,),           _SAME,        (),                     _DROP),
    (Input.LIVE_GAP,               (_FOLLOWING,),           _SAME,        (_CLEAR, _LOSE),        _JUDGE),
    (Input.LIVE_RESTART,           (_FOLLOWING,),           _SAME,        _FROM_ANYWHERE,         _JUDGE),
    (Input.FIRST_LIVE,             (_FOLLOWING,),           _SAME,        (),                     _DROP),
    (Input.CLEARED,                (_FOLLOWING,),           _SAME,        (),                     _DROP),
    (Input.MALFORMED,              (_FOLLOWING,),           _SAME,        (_CLEAR,),              _DROP),
    (Input.UNREADABLE,             (_FOLLOWING,),           _SAME,        (_CLEAR,),              _DROP),
    (Input.UNREADABLE_STORED,      (_FOLLOWING,),           _SAME,        (),                     _DROP),
    (Input.DISTRUSTED,             (_FOLLOWING,),           _SAME,        (_CLEAR,),              _DROP),
    (Input.FAILED_TO_APPLY,        _LIVE_ONLY_PHASES,        _SAME,        (_CLEAR,),              _DROP),
    (Input.HEARTBEAT_MISSED,       _LIVE_ONLY_PHASES,        _SAME,        (_MISSED,),             _DROP),
    (Input.DISCONNECTED,           _LIVE_ONLY_PHASES,        _DISCONNECTED, (_VOID,),              _DROP),
    (Input.RECONNECTED,            _LIVE_ONLY_PHASES,        _FOLLOWING,   _FROM_ANYWHERE,         _DROP),
    (Input.RECONNECTED_ASTRAY,     _LIVE_ONLY_PHASES,        _FOLLOWING,   _FROM_ANYWHERE,         _DROP),
    (Input.STARTED_OVER,           _LIVE_ONLY_PHASES,        _FOLLOWING,   _OVER_ANYWHERE,         _DROP),
    (Input.PURGED,                 _LIVE_ONLY_PHASES,        _FOLLOWING,   (_VOID, _CLEAR, _LOSE), _DROP),
)
# fmt: on
_NOT_REPLAYING = (_FOLLOWING, _CATCHING_UP, _DISCONNECTED)
_NOT_FOLLOWING = (_CATCHING_UP, *_REPLAYING, _DISCONNECTED)
_ENDS = (
    Input.REPLAY_ENDED,
    Input.REPLAY_ENDED_CONTINUED,
    Input.REPLAY_ENDED_EMPTY,
    Input.REPLAY_ENDED_UNPROVEN,
    Input.REPLAY_BROKE_OFF,
    Input.REPLAY_FAILED,
)
_IGNORED: Mapping[Input, Iterable[Phase]] = {
    Input.LIVE_FRAME: (_DISCONNECTED,),
    Input.REPLAYED_FRAME: _NOT_REPLAYING,
    **dict.fromkeys(_ENDS, _NOT_REPLAYING),
    Input.HEARTBEAT_CONFIRMED: _NOT_FOLLOWING,
    Input.HEARTBEAT_BEHIND: _NOT_FOLLOWING,
}
_LIVE_ONLY_IGNORED: Mapping[Input, Iterable[Phase]] = {
    Input.LIVE_FRAME: (_DISCONNECTED,),
    **dict.fromkeys(
        (Input.REPLAYED_FRAME, *_ENDS, Input.HEARTBEAT_CONFIRMED, Input.HEARTBEAT_BEHIND), _LIVE_ONLY_PHASES
    ),
}

_W, _P, _G = Knowledge.WHOLE, Knowledge.PARTIAL, Knowledge.GIVEN_UP
_U, _UG = Knowledge.UNTRUSTED, Knowledge.UNTRUSTED_GIVEN_UP
_NO = None
_KnowledgeRows: TypeAlias = Mapping[Input, tuple[Knowledge | None, ...]]

# Distrust lasts until a new engine appears. Until then frames are not read, so that no input says what they hold.
# fmt: off
_KNOWLEDGE: _KnowledgeRows = {
    # from                        WHOLE  PARTIAL  GIVEN_UP  UNTRUSTED  UNTRUSTED_GIVEN_UP
    Input.LIVE_RESTART:          (_W,    _W,      _W,       _W,        _W),
    Input.HELD_RESTART:          (_W,    _W,      _W,       _W,        _W),
    Input.REPLAY_RESTART:        (_W,    _W,      _W,       _W,        _W),
    Input.REPLAY_ENDED_UNPROVEN: (_W,    _W,      _W,       _W,        _W),
    Input.FIRST_LIVE:            (_W,    _W,      _W,       _W,        _W),  # no engine publishes it twice
    Input.FIRST_REPLAYED:        (_W,    _W,      _NO,      _U,        _NO),
    Input.RECONNECTED_ASTRAY:    (_NO,   _W,      _W,       _U,        _U),
    Input.STARTED_OVER:          (_W,    _W,      _W,       _U,        _U),
    Input.PURGED:                (_P,    _P,      _P,       _U,        _U),
    Input.CLEARED:               (_NO,   _W,      _W,       _NO,       _NO),
    Input.MALFORMED:             (_P,    _P,      _G,       _NO,       _NO),
    Input.UNREADABLE:            (_P,    _P,      _G,       _NO,       _NO),
    # Even after a clear in the same batch, which may come before what was not read.
    Input.UNREADABLE_STORED:     (_P,    _P,      _G,       _NO,       _NO),
    Input.DISTRUSTED:            (_U,    _U,      _UG,      _NO,       _NO),
    Input.FAILED_TO_APPLY:       (_P,    _P,      _G,       _U,        _UG),
    Input.REPLAY_TRUNCATED:      (_P,    _P,      _G,       _U,        _UG),
    Input.REPLAY_ENDED_EMPTY:    (_P,    _P,      _NO,      _U,        _NO),
    Input.REPLAY_FAILED:         (_G,    _G,      _G,       _UG,       _UG),
    Input.HELD_TOO_MANY:         (_G,    _G,      _G,       _UG,       _UG),
}
_LIVE_ONLY_KNOWLEDGE: _KnowledgeRows = {  # nothing is ever given up
    # from                        WHOLE  PARTIAL  GIVEN_UP  UNTRUSTED  UNTRUSTED_GIVEN_UP
    Input.LIVE_GAP:              (_P,    _P,      _NO,      _U,        _NO),
    Input.LIVE_RESTART:          (_P,    _P,      _NO,      _P,        _NO),
    Input.FIRST_LIVE:            (_W,    _W,      _NO,      _W,        _NO),
    Input.RECONNECTED:           (_P,    _P,      _NO,      _U,        _NO),
    Input.RECONNECTED_ASTRAY:    (_NO,   _P,      _NO,      _U,        _NO),
    Input.STARTED_OVER:          (_P,    _P,      _NO,      _U,        _NO),
    Input.PURGED:                (_P,    _P,      _NO,      _U,        _NO),
    Input.CLEARED:               (_NO,   _W,      _NO,      _NO,       _NO),
    Input.MALFORMED:             (_P,    _P,      _NO,      _NO,       _NO),
    Input.UNREADABLE:            (_P,    _P,      _NO,      _NO,       _NO),
    Input.UNREADABLE_STORED:     (_P,    _P,      _NO,      _NO,       _NO),
    Input.DISTRUSTED:            (_U,    _U,      _NO,      _NO,       _NO),
    Input.FAILED_TO_APPLY:       (_P,    _P,      _NO,      _U,        _NO),
}
# fmt: on


class Tables(NamedTuple):
    """The transitions of one kind of feed."""

    phases: Mapping[tuple[Phase, Input], Transition]
    ignored: frozenset[tuple[Phase, Input]]
    """Pairs that change nothing, not even a count."""
    knowledge: Mapping[tuple[Knowledge, Input], Knowledge]
    neutral: frozenset[Input]
    """Inputs that leave the knowledge as it is."""
    steps: Mapping[tuple[Phase, Knowledge, Input], Step | None]
    """All of this in one table: what follows; None for an input that is ignored."""

    def step(self, phase: Phase, knowledge: Knowledge, given: Input) -> Step | None:
        """What follows; None for an input that is ignored. Raises `ImpossibleInput`."""
        try:
            return self.steps[phase, knowledge, given]
        except KeyError:
            state = knowledge if (phase, given) in self.phases else phase
            raise ImpossibleInput(state, given) from None


def _tables(rows: Iterable[_Row], ignored: Mapping[Input, Iterable[Phase]], knowledge: _KnowledgeRows) -> Tables:
    phases: dict[tuple[Phase, Input], Transition] = {}
    for given, where, following, actions, fate in rows:
        for phase in where:
            if (phase, given) in phases:
                raise ValueError(f"two rows for {phase.value} and {given.value}")
            phases[phase, given] = Transition(following or phase, actions, fate)
    known = {
        (now, given): then
        for given, row in knowledge.items()
        for now, then in zip(Knowledge, row, strict=True)
        if then is not None
    }
    dropped = frozenset((phase, given) for given, where in ignored.items() for phase in where)
    neutral = frozenset(Input) - knowledge.keys()
    steps: dict[tuple[Phase, Knowledge, Input], Step | None] = {}
    for now in Knowledge:
        for phase, given in dropped:
            steps[phase, now, given] = None
        for (phase, given), (following, actions, fate) in phases.items():
            then = now if given in neutral else known.get((now, given))
            if then is not None:
                steps[phase, now, given] = Step(following, then, COUNTED.get(given, ()), actions, fate)
    return Tables(MappingProxyType(phases), dropped, MappingProxyType(known), neutral, MappingProxyType(steps))


WITH_REPLAY = _tables(_ROWS, _IGNORED, _KNOWLEDGE)
LIVE_ONLY = _tables(_LIVE_ONLY_ROWS, _LIVE_ONLY_IGNORED, _LIVE_ONLY_KNOWLEDGE)
