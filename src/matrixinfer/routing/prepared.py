"""What the preparer hands to the router, and what it collects on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import msgspec
from msgspec.structs import replace

from matrixinfer.blocks import TokenIds
from matrixinfer.pods.registry import Pod
from matrixinfer.prompt.base import Prompt
from matrixinfer.prompt.late import TokensLate
from matrixinfer.prompt.outline import Outline
from matrixinfer.routing.destinations import ANYWHERE, Way
from matrixinfer.routing.lookup import Matches
from matrixinfer.routing.sizing import Sizing
from matrixinfer.scheduler.framework import SchedulingRequest
from matrixinfer.telemetry.stages import Stages


class Degraded(Enum):
    """What a decision has to do without. The values are labels of `matrixinfer_degraded_total`."""

    TOKENIZE = "tokenize"
    """Token ids: the prompt is routed by load, and by where its bytes were sent lately."""
    LATE = "late"
    """Token ids: an engine is still being asked for them. The prompt is routed as without them."""
    MEDIA = "media"
    """The token ids behind the first image, audio or video."""
    PARITY = "parity"
    """The index: our token ids have lately differed from the engine's."""
    INDEX = "index"
    """The index: it did not answer."""

    __hash__ = object.__hash__  # every request asks for members of maps


class Prepared(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A request with everything that had to be awaited for it."""

    prompt: Prompt
    body: bytes
    """As the client sent it, but for a salt that keeps its tenant apart."""
    request: SchedulingRequest
    pods: Sequence[Pod]
    """Those that serve the model."""
    matches: Matches | None
    """What their endpoints hold of the prompt; None when the index was not asked or could not answer."""
    base_model: str
    """The model that the engines run; below an adapter, if one was asked for."""
    ids: TokenIds | None
    """Token ids of the prompt, shape (n,)."""
    tokenizer: str | None
    """The model whose tokenizer made the ids; None unless they can be compared with the engine's."""
    sizing: Sizing
    """What is known about its size and its bytes beyond the ids."""
    degraded: Mapping[Degraded, str]
    """What the decision has to do without, and why in words."""
    timings_ms: Mapping[str, float]
    """Milliseconds of each step."""
    outline: Outline | None = None
    """The prompt's outline, where what the engine makes of its media is still to be learnt."""
    way: Way = ANYWHERE
    """What decided about the pods that may get it."""
    late: TokensLate | None = None
    """Passes on the token ids that were not there in time."""

    def without_body(self) -> Prepared:
        """The same for what outlasts the request, whose body is then no longer counted."""
        return replace(self, body=b"", late=None)

    @property
    def notes(self) -> Sequence[str]:
        """What the decision says about it in words."""
        return [*([] if self.way.route is None else [self.way.route.note]), *self.degraded.values()]

    @property
    def is_approximate(self) -> bool:
        """Whether matches mean nothing, so that the request is routed by what was sent where."""
        # Nothing is missing as a rule, and every candidate asks.
        return bool(self.degraded) and (Degraded.PARITY in self.degraded or Degraded.INDEX in self.degraded)


class Steps:
    """Timings and degradations while a request is prepared."""

    __slots__ = ("_began", "_clock", "_name", "degraded", "stages", "timings_ms")

    def __init__(self, clock: Callable[[], float], stages: Stages | None = None) -> None:
        self._clock = clock
        self.stages = stages
        self._name = ""
        self._began = 0.0
        self.timings_ms: dict[str, float] = {}
        self.degraded: dict[Degraded, str] = {}

    def step(self, name: str) -> Steps:
        """Time what runs within this context. Steps do not nest."""
        self._name = name
        return self

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(self, *_: object) -> None:
        ended = self._clock()
        self.timings_ms[self._name] = (ended - self._began) * 1000
        if self.stages is not None:
            self.stages.add(self._name, self._began, ended)
