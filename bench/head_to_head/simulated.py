"""Simulated engines in the place of the real ones: as slow, with caches as large, and on the same ports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.vllm.engine import NAME, Engine
from tests.vllm.model import tokenizer_of

from matrixinfer.sim.model import Timing

_SHARED = 1.5
"""How much longer a step takes while router, clients and the engines' own servers run on the same two cores: so much that
round robin waits as long as in front of the real engines."""
TIMING = Timing(
    step=0.011 * _SHARED,
    prefill_token=0.00013 * _SHARED,
    decode_sequence=0.0029 * _SHARED,
    attention_pair=1.58e-7 * _SHARED,
)
"""As `matrixinfer calibrate` measured the two real engines at the same time. What a decoding request reads of its context
is part of `decode_sequence`, for 2,000 tokens."""
_MAX_TOKENS = 2_048
"""Of a step: vLLM's default on a CPU."""


class SimulatedEngine(Engine):
    """An engine whose `executable` is Python."""

    def arguments(self) -> Iterator[str]:
        options, (api, events, replays) = self.options, self.ports
        values = {
            "model": NAME,
            "tokenizer": tokenizer_of(self.model),
            "port": api,
            "kv-events-port": events,
            "kv-replay-port": replays,
            "block-size": options.block_size,
            "num-gpu-blocks-override": options.blocks,
            "max-model-len": min(options.max_tokens, options.block_size * (options.blocks - 2)),
            "max-num-seqs": 16,
            "max-num-batched-tokens": _MAX_TOKENS,
            "step-seconds": TIMING.step,
            "prefill-seconds": TIMING.prefill_token,
            "decode-seconds": TIMING.decode_sequence,
            "attention-seconds": TIMING.attention_pair,
        }
        yield from ("-m", "matrixinfer", "engine")
        for name, value in values.items():
            yield from (f"--{name}", str(value))


def python() -> Path:
    """What runs a simulated engine."""
    return Path(sys.executable)
