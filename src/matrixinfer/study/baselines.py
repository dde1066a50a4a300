"""Routing policies without KV events: what most load balancers and many LLM routers do."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Sequence
from hashlib import blake2b

from matrixinfer.study.jobs import Job, Router


class Baseline(Router):
    """Counts what it has sent where; subclasses choose among the pods that answer."""

    def __init__(self, *, seed: int, block_size: int, pod_tokens: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311  # a simulation
        self.block_size = block_size
        self.pod_tokens = pod_tokens
        self.in_flight: dict[str, int] = {}
        self.ongoing: dict[str, int] = {}
        """Tokens of the prompts in flight."""
        self.queued: dict[str, int] = {}
        """Tokens of the prompts whose answers have not begun."""
        self._pods: list[str] = []

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Choose one of `pods`; never empty."""
        raise NotImplementedError

    def sent(self, job: Job) -> None:
        """The request goes to `job.pod`."""

    def least(self, pods: Sequence[str], load: dict[str, int] | None = None) -> str:
        """The least loaded pod; equal ones take turns at random."""
        loads = self.in_flight if load is None else load
        lowest = min(loads[pod] for pod in pods)
        return self.rng.choice([pod for pod in pods if loads[pod] == lowest])

    def route(self, job: Job, without: Collection[str] = ()) -> str:
        """Choose a pod, and count the request there."""
        pods = [pod for pod in self._pods if pod not in without] or self._pods or sorted(self.in_flight)
        job.pod = pod = self.choose(job, pods)
        self.in_flight[pod] += 1
        self.ongoing[pod] += job.prompt
        self.queued[pod] += job.prompt
        job.ticket = True
        self.sent(job)
        return pod

    def answered(self, job: Job) -> None:
        """The answer begins."""
        if job.ticket:
            self.queued[job.pod] -= job.prompt
            job.ticket = False

    def ended(self, job: Job) -> None:
        """The answer is complete."""
        self.answered(job)
        self.in_flight[job.pod] -= 1
        self.ongoing[job.pod] -= job.prompt

    def failed(self, job: Job) -> None:
        """The request counts no longer."""
        self.ended(job)

    def join(self, pod: str) -> None:
        """A pod joins."""
        self._pods.append(pod)
        for counts in (self.in_flight, self.ongoing, self.queued):
            counts[pod] = 0

    def leave(self, pod: str) -> None:
        """A pod leaves."""
        if pod in self._pods:
            self._pods.remove(pod)

    def down(self, pod: str) -> None:
        """A pod does not answer."""
        self.leave(pod)

    def up(self, pod: str) -> None:
        """A pod answers again."""
        self._pods.append(pod)
        self._pods.sort()


class Random(Baseline):
    """Any pod."""

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Choose at random."""
        return self.rng.choice(pods)


class RoundRobin(Baseline):
    """Each pod in turn."""

    _turn = -1

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Choose the next one."""
        self._turn += 1
        return pods[self._turn % len(pods)]


class LeastRequest(Baseline):
    """The pod with the fewest requests in flight."""

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Choose the least loaded."""
        return self.least(pods)


class PowerOfTwo(Baseline):
    """The less loaded of two random pods."""

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Draw two."""
        return self.least(self.rng.sample(pods, min(2, len(pods))))


class SessionHash(Baseline):
    """Each session has a pod, by rendezvous hashing, whatever the load."""

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Choose by the session's name."""
        return rendezvous(job.session.encode(), pods)


class PrefixHash(Baseline):
    """Each beginning of a prompt has a pod, by rendezvous hashing over the blocks of its first `TOKENS` tokens."""

    TOKENS = 2048

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Choose by the hash of the last of these blocks, or of the prompt's last full one."""
        blocks = min(max(1, self.TOKENS // self.block_size), job.prompt // self.block_size)
        return rendezvous(job.hashes[blocks - 1].to_bytes(8, "big"), pods) if blocks else self.least(pods)


class SessionSticky(Baseline):
    """A session stays at its pod unless the tokens in flight there exceed twice the mean; then it moves to the least."""

    FACTOR = 2.0

    def __init__(self, *, seed: int, block_size: int, pod_tokens: int) -> None:
        super().__init__(seed=seed, block_size=block_size, pod_tokens=pod_tokens)
        self._home: dict[str, str] = {}

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Stay, or move."""
        home = self._home.get(job.session)
        mean = sum(self.ongoing[pod] for pod in pods) / len(pods)
        if home is None or home not in pods or self.ongoing[home] > self.FACTOR * mean:
            home = self._home[job.session] = self.least(pods, self.ongoing)
        return home


class Approximate(Baseline):
    """Remembers which blocks it has sent to each pod, as many as the pod's cache holds, the least recent ones leaving first."""

    def __init__(self, *, seed: int, block_size: int, pod_tokens: int) -> None:
        super().__init__(seed=seed, block_size=block_size, pod_tokens=pod_tokens)
        self._sent: dict[str, OrderedDict[int, None]] = {}

    def matched(self, job: Job, pod: str) -> int:
        """Prompt tokens that were sent to the pod before."""
        sent, count = self._sent.get(pod) or OrderedDict[int, None](), 0
        for key in job.hashes[: (job.prompt - 1) // self.block_size]:
            if key not in sent:
                break
            count += 1
        return count * self.block_size

    def remembered(self, pod: str) -> int:
        """Blocks that are remembered of a pod."""
        return len(self._sent.get(pod, ()))

    def sent(self, job: Job) -> None:
        """Remember the prompt's blocks; its last one is the least recent."""
        sent = self._sent.setdefault(job.pod, OrderedDict())
        for key in reversed(job.hashes[: job.prompt // self.block_size]):
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) * self.block_size > self.pod_tokens:
            sent.popitem(last=False)

    def leave(self, pod: str) -> None:
        """What was sent to it is lost."""
        super().leave(pod)
        self._sent.pop(pod, None)


class ApproxPrefix(Approximate):
    """Weighs the share of the prompt that was sent to a pod before, 4, against its queue, 3."""

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Choose the highest sum."""
        longest = max(1, *(self.in_flight[pod] for pod in pods))
        scores = {
            pod: 4 * self.matched(job, pod) / job.prompt + 3 * (1 - self.in_flight[pod] / longest) for pod in pods
        }
        best = max(scores.values())
        return self.rng.choice([pod for pod in pods if scores[pod] == best])


class LongestMatch(Approximate):
    """The pod that was sent the longest part of the prompt before, whatever its load."""

    def choose(self, job: Job, pods: Sequence[str]) -> str:
        """Choose the longest match; without one, the least loaded pod."""
        matches = {pod: self.matched(job, pod) for pod in pods}
        best = max(matches.values())
        return self.least([pod for pod in pods if matches[pod] == best])


def rendezvous(key: bytes, pods: Sequence[str]) -> str:
    """The pod of a key, which changes only when that pod leaves, or a new one takes the key over."""
    return max(pods, key=lambda pod: blake2b(key + pod.encode(), digest_size=8).digest())
