"""What the layout of an engine's events shows of its blocks, and what it hides."""

from __future__ import annotations

from msgspec import UNSET

from matrixinfer.kvevents.counts import UntrustedEvents
from matrixinfer.kvevents.tiers import Place
from matrixinfer.kvevents.wire import BlockStored, is_hash_of_tokens_alone

_RADIX_MEDIA = (None, "GPU", "CPU_PINNED", "DISK", "EXTERNAL")


class Layout:
    """Learnt from the events; the same until another engine is expected."""

    def __init__(self) -> None:
        self.is_radix: bool | None = None
        """The layout is SGLang's; None before the first event that shows it."""
        self.is_tensorrt = False
        """The layout is TensorRT-LLM's."""
        self.hides_salts = False
        """The events do not show a block's salt: a salted prompt looks like a plain one."""
        self.hides_adapters = False
        """The events do not show a block's adapter."""
        self.is_annotated = False
        """Arrays have a map at their end where there is something to say: without it there is neither salt nor adapter."""
        self._numbers_adapters = False  # events give adapters as numbers: their blocks are recognised, not indexed

    def learn(self, event: BlockStored) -> bool:
        """Learn from a stored event. Returns whether blocks stored before may not be what they seemed.

        Connectors leave out fields too, as SGLang does, so only its own media show its layout at first. Raises
        `UntrustedEvents`.
        """
        if event.is_annotated and not self.is_annotated:
            self.is_annotated = self.is_radix = True
            self.hides_salts = self.hides_adapters = False
            return False
        if event.hides_keys:
            self.hides_salts = True
            self._numbers_adapters = self._numbers_adapters or event.lora_id is not None
            self.hides_adapters = event.lora_name is UNSET and not self._numbers_adapters
            if is_hash_of_tokens_alone(event):
                raise UntrustedEvents("its blocks are hashed without what precedes them")
        if event.is_of_tensorrt and self.is_radix is not False:
            self.is_tensorrt = self.hides_salts = True
        was_radix = self.is_radix
        if was_radix is not False:
            if not event.is_of_radix_tree:
                self.is_radix = False
            elif event.medium in _RADIX_MEDIA:
                self.is_radix = True
        return was_radix is True and not self.is_radix

    def place(self, medium: str | None, group: int | None) -> Place:
        """The place of a block. SGLang finds a prompt's pages on any medium: each is one more place of a page."""
        if medium is None or (self.is_radix and medium in _RADIX_MEDIA):
            return "GPU", group or 0
        return medium, group or 0

    def reset(self) -> None:
        """Expect another engine."""
        self.is_radix = None
        self.is_annotated = self.is_tensorrt = False
        self.hides_salts = self.hides_adapters = self._numbers_adapters = False
