"""What computing a part of a prompt costs: attention makes later tokens cost more than the first ones."""

from __future__ import annotations

ATTENTION_TOKENS = 50_000
"""Where in a prompt a token costs twice as much as at its start, because attention then costs as much as everything else.

From the sizes of models: parameters / (2 × layers × width of attention), which is 31,000 for Llama 3.1 8B and 54,000 for
70B. Prompts that are much shorter cost the same whatever this is.
"""
_PER_TOKEN = 1.0 / ATTENTION_TOKENS


def prefill_work(tokens: float, prompt: float) -> float:
    """The last `tokens` of a prompt of `prompt` tokens, as the number of tokens at a prompt's start that take as long."""
    return tokens * (1.0 + (prompt - 0.5 * tokens) * _PER_TOKEN)
