"""A plugin of vLLM that keeps prefix caching on for MLA models on CPUs without AMX, where vLLM turns it off.

vLLM loads it in every process of an engine that has this file's folder and `entry_points.txt` on its path (`kinds.py`).
It changes which settings are allowed, and nothing of the cache, its events or the answers' usage.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Undo what the CPU platform does to the settings of MLA models."""
    from vllm.platforms.cpu import CpuPlatform  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls: type, vllm_config: Any) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        kept = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens, cache.enable_prefix_caching
        check(cls, vllm_config)
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens, cache.enable_prefix_caching = kept

    CpuPlatform.check_and_update_config = classmethod(check_and_keep)
