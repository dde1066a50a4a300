"""Sets up what sends token ids to engines, where the configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

from matrixinfer.app.engines import Engines
from matrixinfer.config import TokenizationConfig
from matrixinfer.gateway.token_ids import TokenIdSender
from matrixinfer.pods.pod import Pod
from matrixinfer.prompt.manager import TokenizerManager
from matrixinfer.telemetry.metrics import Metrics
from matrixinfer.trust.parity import Parity
from matrixinfer.trust.sent_ids.honouring import Honouring
from matrixinfer.trust.sent_ids.probe import IdsProber


async def open_token_ids(
    config: TokenizationConfig,
    engines: Engines,
    tokenizers: TokenizerManager,
    parity: Parity,
    metrics: Metrics,
    clock: Callable[[], float],
    stack: AsyncExitStack,
) -> TokenIdSender | None:
    """What sends them; None where that is off. Its questions to engines end with `stack`."""
    if config.send_ids == "never":
        return None

    def forget(pod: Pod) -> None:
        for endpoint in pod.endpoints:
            parity.forget(endpoint.name)

    prober = IdsProber(engines.session, tokenizers, engines.registry)
    honouring = await stack.enter_async_context(Honouring(prober.probe, clock, metrics, on_other_run=forget))
    return TokenIdSender(engines.registry, parity, honouring, metrics)
