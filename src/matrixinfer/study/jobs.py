"""A request on its way through a replay, and what routers are told about it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from matrixinfer.pods.registry import EngineMetrics


class Job:
    """One request."""

    __slots__ = (
        "arrived",
        "cached",
        "ended",
        "first",
        "hashes",
        "number",
        "pod",
        "predicted",
        "prompt",
        "reply",
        "router",
        "session",
        "ticket",
    )

    def __init__(
        self, number: int, session: str, prompt: int, reply: int, hashes: Sequence[int], arrived: float
    ) -> None:
        self.number = number
        """Position in the trace."""
        self.session = session
        self.prompt = prompt
        self.reply = reply
        self.hashes = hashes
        """Of the blocks that prompt and reply fill."""
        self.arrived = arrived
        self.router = 0
        """Which of the gateways takes it."""
        self.pod = ""
        self.predicted: int | None = None
        """Prompt tokens that its gateway predicted to be cached; None if it predicts nothing."""
        self.ticket: object = None
        """What its router holds for it."""
        self.cached = 0
        self.first: float | None = None
        self.ended: float | None = None


class Frame(NamedTuple):
    """A batch of KV events on its way from an engine."""

    due: float
    """When it arrives."""
    pod: str
    number: int
    payload: bytes


class Router:
    """Chooses pods. One instance stands for one gateway: it knows what it has sent itself, and what it is told here.

    Of what it is told, it takes no notice unless a subclass does.
    """

    def route(self, job: Job, without: Collection[str] = ()) -> str:
        """Choose a pod, other than those in `without` if there is one, and count the request there."""
        raise NotImplementedError

    def answered(self, job: Job) -> None:
        """The answer of `job.pod` begins."""

    def ended(self, job: Job) -> None:
        """The answer is complete."""

    def failed(self, job: Job) -> None:
        """The pod went down before the end of the answer."""

    def join(self, pod: str) -> None:
        """A pod with an empty cache joins the fleet."""

    def leave(self, pod: str) -> None:
        """A pod leaves the fleet; requests there still end."""

    def down(self, pod: str) -> None:
        """A pod does not answer any more."""

    def up(self, pod: str) -> None:
        """A pod that was down answers again, with an empty cache."""

    def measured(self, pod: str, metrics: EngineMetrics) -> None:
        """The metrics of a pod's engine were read."""

    def publish(self, frame: Frame) -> None:
        """A frame of KV events is on its way to the gateway."""

    def say(self, now: float) -> bytes | None:
        """What the gateway has to say to the others; None for nothing."""
        return None

    def hear(self, message: bytes) -> None:
        """What another gateway has said."""

    def replayed(self, pod: str, start: int, frames: Sequence[tuple[int, bytes]]) -> None:
        """The answer to a request for the events from `start` on."""
