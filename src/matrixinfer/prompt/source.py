"""Where a model's token ids come from, and what the check of a tokenizer that was found has shown. Plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from matrixinfer.prompt.samples import SampleFacts

Kind: TypeAlias = Literal["configured", "found", "asked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the token ids of one model's prompts come from."""

    kind: Kind
    """A configured tokenizer, one that was found, or an engine's `/tokenize`."""
    path: str | None = None
    origin: str | None = None
    """How the files were found, for people."""
    asks_for_chats: bool = False
    """An engine is asked for chats, although texts are tokenized here."""
    reason: str | None = None
    """Why an engine is asked, for all prompts or for chats."""
    checked: Sequence[str] = ()
    """The engines whose token ids the tokenizer was compared with."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Folders that were found and are not used, and why."""

    def view(self) -> dict[str, object]:
        """As JSON-able data."""
        return {
            "source": self.kind,
            "path": self.path,
            "origin": self.origin,
            "chats": "asked" if self.kind == "asked" or self.asks_for_chats else self.kind,
            "reason": self.reason,
            "checked": list(self.checked),
            "refused": dict(self.refused),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """How the token ids of the samples compare with those of one engine, or of several."""

    unanswered: str | None = None
    """Why texts could not be compared."""
    refused: str | None = None
    """Why the tokenizer cannot be used at all."""
    chats: str | None = None
    """Why it cannot be used for chats."""
    again: bool = False
    """A sample was not answered, so the comparison must be made again."""

    @classmethod
    def of(cls, engine: str, samples: Iterable[SampleFacts]) -> Checked:
        """What the samples of one engine show. Chats that were not compared because the engine is asked show nothing."""
        unanswered = refused = chats = None
        again = False
        for sample in samples:
            if sample.is_equal or (
                sample.is_chat and not (sample.compared or sample.engine_error or sample.gateway_error)
            ):
                continue
            why = _difference(sample, engine)
            is_open = sample.engine_error is not None and not sample.refused
            again = again or is_open
            if sample.is_chat:
                chats = chats or why
            elif is_open:
                unanswered = unanswered or why
            else:
                refused = refused or why
        return cls(unanswered=unanswered, refused=refused, chats=chats, again=again)

    @classmethod
    def all(cls, each: Iterable[Checked]) -> Checked:
        """What holds for all engines together."""
        results = list(each)
        return cls(
            unanswered=next((one.unanswered for one in results if one.unanswered), None),
            refused=next((one.refused for one in results if one.refused), None),
            chats=next((one.chats for one in results if one.chats), None),
            again=any(one.again for one in results),
        )


def _difference(sample: SampleFacts, engine: str) -> str:
    if sample.compared:
        return f"{sample.name} differs from the token ids of {engine} from token {sample.first_difference} on"
    if sample.engine_error is not None and (sample.gateway_error is None or not sample.refused):
        return f"{sample.name} could not be compared with {engine}: {sample.engine_error}"
    return f"{sample.name} cannot be tokenized: {sample.gateway_error}"
