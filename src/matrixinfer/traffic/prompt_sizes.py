"""Estimates how many tokens a prompt's bytes are, learned for each model from the counts in its answers. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType

from matrixinfer.traffic.byte_chunks import Chunks, Kind

BYTES_PER_TOKEN = 4.0
"""Bytes of text per token, until answers show it."""
MEDIUM_TOKENS: Mapping[Kind, float] = MappingProxyType({"image": 1000.0, "audio": 500.0, "video": 4000.0})
"""Tokens of one medium, until answers show it."""
_BYTES_BOUNDS = 1.0, 16.0
_MEDIUM_BOUNDS = 1.0, 100_000.0
_PRIOR_TOKENS = 256.0
"""The default ratio weighs as much as an answer to a prompt of this many tokens."""
_KEPT = 0.95
"""The weight of earlier answers after each further one."""
_MAX_MODELS = 1024


class Rates:
    """The estimate for one model. A fresh one has the defaults."""

    __slots__ = ("_bytes", "_media", "_tokens")

    def __init__(self) -> None:
        self._bytes, self._tokens = BYTES_PER_TOKEN * _PRIOR_TOKENS, _PRIOR_TOKENS
        self._media: dict[Kind, tuple[float, float]] = {}  # tokens and media, both fading

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token."""
        return _bounded(self._bytes / self._tokens, _BYTES_BOUNDS)

    def medium(self, kind: Kind) -> float:
        """Tokens of one medium."""
        tokens, count = self._media.get(kind, (MEDIUM_TOKENS[kind], 1.0))
        return _bounded(tokens / count, _MEDIUM_BOUNDS)

    def tokens(self, text_bytes: int, media: Mapping[Kind, int]) -> int:
        """The estimated tokens of some text and media."""
        return round(text_bytes / self.bytes_per_token + sum(self.medium(kind) * n for kind, n in media.items()))

    def ends(self, chunks: Chunks, known: int, known_bytes: int) -> Sequence[int]:
        """Tokens from the prompt's start to the end of each chunk, if its first `known_bytes` of text are `known` tokens."""
        ends, media, per_byte = [], 0.0, 1.0 / self.bytes_per_token
        known_rate = known / known_bytes if known_bytes else 0.0
        for text, kind in zip(chunks.text, chunks.kinds, strict=True):
            if kind is not None:
                media += self.medium(kind)
            ends.append(round(min(text, known_bytes) * known_rate + max(0, text - known_bytes) * per_byte + media))
        return ends

    def learn_text(self, text_bytes: int, tokens: int) -> None:
        """An answer says that a prompt of `text_bytes` has `tokens`."""
        if text_bytes and tokens:
            self._bytes = _KEPT * self._bytes + text_bytes
            self._tokens = _KEPT * self._tokens + tokens

    def learn_media(self, kind: Kind, count: int, tokens: int) -> None:
        """An answer says that `count` media have `tokens`."""
        before, counted = self._media.get(kind, (MEDIUM_TOKENS[kind], 1.0))
        self._media[kind] = _KEPT * before + max(0, tokens), _KEPT * counted + count


class PromptSizes:
    """The rates of every model, for the 1,024 models learned last."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, Rates] = OrderedDict()

    def __len__(self) -> int:
        """Models that something was learned about."""
        return len(self._models)

    def of(self, model: str) -> Rates:
        """The rates of a model; the defaults if nothing was learned."""
        return self._models.get(model, _DEFAULTS)

    def learn(self, model: str, tokens: int, *, text_bytes: int, known: int = 0, media: Mapping[Kind, int]) -> None:
        """An answer counts `tokens` in a prompt: `known` ones, and those of `text_bytes` and `media`."""
        rates = self._models.pop(model, None) or Rates()
        self._models[model] = rates
        if len(self._models) > _MAX_MODELS:
            self._models.popitem(last=False)
        if not media:
            rates.learn_text(text_bytes, tokens - known)
        elif len(media) == 1:  # with several kinds the answer does not say which is how large
            ((kind, count),) = media.items()
            rates.learn_media(kind, count, tokens - known - rates.tokens(text_bytes, {}))

    def keep_models(self, models: Container[str]) -> None:
        """Forget models that are not among `models`."""
        for model in [each for each in self._models if each not in models]:
            del self._models[model]


def _bounded(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


_DEFAULTS = Rates()
