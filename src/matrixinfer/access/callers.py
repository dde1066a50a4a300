"""Who sends a request, and what that caller may use."""

from __future__ import annotations

from dataclasses import dataclass

from matrixinfer.config.access import QuotaConfig
from matrixinfer.errors import Forbidden

UNLIMITED = QuotaConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The holder of a key or a token."""

    name: str
    """The key's name, or the token's subject."""
    tenant: str
    account: str
    """What its use is counted under. A key and a token's subject of the same name have different accounts."""
    models: frozenset[str] | None = None
    """The models that it may ask for, by the names that clients use; None for all."""
    quota: QuotaConfig = UNLIMITED

    def may_use(self, model: str) -> bool:
        """Whether it may ask for a model."""
        return self.models is None or model in self.models

    def check_any_model(self) -> None:
        """Raises `Forbidden` if there are models that it may not ask for."""
        if self.models is not None:
            raise Forbidden(
                "This key may not use every model, and it is not clear which one this request names: expected the field "
                "`model` once, in a JSON object or a plain form.",
                param="model",
            )

    def check_model(self, model: str) -> None:
        """Raises `Forbidden` if it may not ask for a model."""
        if not self.may_use(model):
            raise Forbidden(f"This key may not use the model `{model[:200]}`.", param="model")
