"""Hands an engine the token ids that the gateway has made already, where that cannot change the answer.

Three things must be so for each request: our ids are the engine's, as its own events have shown for plain requests of
this kind; the engine makes the same answer from them (`trust.sent_ids.honouring`); and nothing else in the request needs
the text (`trust.sent_ids.bodies`). Of each class, the requests that are sampled go without ids: they prove that ours
still are the engine's.
"""

from __future__ import annotations

import asyncio

from matrixinfer.pods.registry import PodRegistry
from matrixinfer.prompt.bounds import LARGE_BYTES
from matrixinfer.prompt.memory import Held
from matrixinfer.routing.in_flight import InFlight
from matrixinfer.routing.prepared import Prepared
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.parity import Parity
from matrixinfer.trust.sent_ids.bodies import CLASSES, takes_ids, with_ids
from matrixinfer.trust.sent_ids.honouring import Honouring

REFUSALS = (400, 422)
"""Answers that may be due to token ids: the request is sent again without them."""
_BYTES_PER_TOKEN = 16
"""What a token id takes in JSON, and once more in the body that has it."""


class TokenIdSender:
    """Decides for each attempt whether the endpoint gets token ids, and makes the body that has them."""

    def __init__(self, registry: PodRegistry, parity: Parity, honouring: Honouring, metrics: Metrics) -> None:
        self._registry = registry
        self._parity = parity
        self._honouring = honouring
        self._metrics = metrics

    async def body_for(self, request: InFlight, held: Held | None) -> bytes | None:
        """The body with token ids for the endpoint that has the request now; None where that gets it as it came.

        `held` takes the memory of the body.
        """
        prepared, pod = request.prepared, self._registry.pod(request.pod.pod)
        ids, path = prepared.ids, prepared.prompt.path
        if ids is None or pod is None or pod.served is None or pod.served.context_length is None:
            return None
        if not _is_plain(prepared) or not takes_ids(path, pod.engine) or request.is_sampled:
            return None
        if not self._parity.is_proven(prepared.tokenizer or "", CLASSES[path], request.pod.name):
            return None
        if not self._honouring.honours(pod, path):
            return None
        if held is not None and not held.take(len(prepared.body) + _BYTES_PER_TOKEN * len(ids)):
            return None
        is_large = len(prepared.body) > LARGE_BYTES
        arguments = path, pod.engine, prepared.body, ids, pod.served.context_length
        body = await asyncio.to_thread(with_ids, *arguments) if is_large else with_ids(*arguments)
        if body is not None:
            self._metrics.token_ids_sent(request.pod.name)
        return body

    def refused(self, request: InFlight) -> None:
        """The endpoint has refused a request with ids that it answers without them."""
        self._honouring.refused(request.pod.pod, request.prepared.prompt.path)

    def view(self, model: str) -> dict[str, object]:
        """What was found about the engines of a model, by pod and path, as JSON-able data."""
        pods = self._registry.pods
        serving = [pod for pod in pods if self._registry.configured_name(pod.base_model or "", [pod]) == model]
        return {pod.name: found for pod in serving if (found := self._honouring.view(pod.name))}

    def forget(self, pod: str) -> None:
        """A pod has gone."""
        self._honouring.forget(pod)


def _is_plain(prepared: Prepared) -> bool:
    """Whether the ids are the whole prompt as the engine would make it, and the prompt is of the plain kind."""
    prompt = prepared.prompt
    if prepared.tokenizer is None or prepared.degraded or prepared.outline is not None or prepared.late is not None:
        return False
    if prompt.request_class != CLASSES.get(prompt.path) or not prompt.reads_cache or not prompt.counted:
        return False
    return not (prompt.more_bytes or prompt.more_tokens or prompt.keep_first or prompt.keep_last)
