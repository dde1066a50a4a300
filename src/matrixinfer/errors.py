"""Every error the product raises on purpose, free of any transport.

MatrixInferError
├── ConfigError              the configuration is wrong; fatal at start
├── RequestError             the client's fault
│   ├── InvalidRequest         malformed or missing fields
│   ├── UnknownModel           no such model here
│   ├── PayloadTooLarge        the body exceeds the limit
│   └── BodyTimeout            the body did not come in time
├── RoutingError             the request is fine, but no pod can take it
│   ├── NoPodAvailable         no pod serves the model now
│   ├── PodUnreachable         every pod tried refused or broke the connection
│   └── PodTimeout             a pod did not answer in time
├── TokenizeError            a prompt could not be tokenized; routing degrades to load
├── UnknownPod               the library's index follows no pod of that name
├── IndexUnavailable         the block index did not answer; routing degrades to load
└── PluginError              a scheduler plugin is unknown, misconfigured or misbehaves
"""

from __future__ import annotations


class MatrixInferError(Exception):
    """Base of all errors of this package."""


class ConfigError(MatrixInferError):
    """The configuration is wrong.

    `path` is the key's path as in `$.pods[0].url`, `message` what was expected there.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


class RequestError(MatrixInferError):
    """The client's request cannot be served as sent. `param` names the offending field, where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(RequestError):
    """Malformed JSON, a missing field or a field of the wrong type."""


class UnknownModel(RequestError):
    """No pod and no configured model answers to the requested name."""


class PayloadTooLarge(RequestError):
    """The request body exceeds the configured limit."""


class BodyTimeout(RequestError):
    """The request body did not come whole within the configured time."""


class RoutingError(MatrixInferError):
    """The request is fine, but no pod can take it."""


class NoPodAvailable(RoutingError):
    """No pod serves the requested model at the moment."""


class PodUnreachable(RoutingError):
    """Every pod that was tried refused or broke the connection before its first byte."""


class PodTimeout(RoutingError):
    """A pod did not answer within the request's deadline."""


class TokenizeError(MatrixInferError):
    """A prompt could not be turned into the engine's token ids."""


class UnknownPod(MatrixInferError):
    """The library's index follows no pod of that name: `Index.follow` it first."""


class IndexUnavailable(MatrixInferError):
    """The block index could not answer in time."""


class PluginError(MatrixInferError):
    """A scheduler plugin is unknown, misconfigured, or returned what the contract forbids."""
