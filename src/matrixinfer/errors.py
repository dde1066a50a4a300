"""Every error that the product raises on purpose. None of them depends on a transport.

Errors that cross package boundaries are defined in this module:

MatrixInferError
├── ConfigError              the configuration is wrong; fatal at start
├── RequestError             the client's fault
│   ├── InvalidRequest         malformed or missing fields
│   ├── Unauthenticated        no valid key or token
│   ├── Forbidden              a key that may not do this
│   ├── LimitExceeded          a key that has used up what it may use
│   ├── UnknownModel           no pod serves the model, and it is not configured
│   ├── UnknownResponse        no pod stores the response
│   ├── PayloadTooLarge        the body exceeds the limit
│   ├── UnsupportedBody        the body is compressed
│   └── BodyTimeout            the body did not arrive in time
├── RoutingError             the request is fine, but no pod can take it
│   ├── NoPodAvailable         no pod serves the model now
│   ├── KeysUnavailable        the public keys that tokens are checked with cannot be read
│   ├── Overloaded             this process has no room for another request
│   ├── PodUnreachable         every pod that was tried refused or broke the connection
│   └── PodTimeout             a pod did not answer in time
├── TokenizeError            a prompt cannot be tokenized; routing falls back to load
├── UnknownPod               the library's index follows no pod of that name
├── IndexUnavailable         the block index did not answer; routing falls back to load
└── PluginError              a scheduler plugin is unknown, misconfigured or misbehaves

Errors that only one package and its direct callers handle are defined next to the code that raises them:

MatrixInferError
├── EngineDown               pods.engine_api: an engine cannot be reached or answers with a server error
├── DnsFailure               pods.discovery.dns: a name server did not answer a question
├── NotHere                  pods.discovery.fleet: a pod cannot be added, removed or drained this way
├── OutOfResources           pods.engine_api: this process cannot ask an engine, whatever that one would answer
├── NotFetched               access.key_source: the keys of an identity provider cannot be read
├── NoKeys                   access.tokens: a document has no public key that can be used
├── UnknownKey               access.tokens: a token is signed with a key that is not at hand
├── MalformedFrame           kvevents.wire: a payload is not a batch of KV events
├── ImpossibleInput          kvevents.transitions: a feed met an input that cannot occur in its state; a bug
├── UntrustedEvents          kvevents.counts: the events do not determine what the engine holds
├── MalformedMessage         traffic.peers.message: bytes from the peers' channel are not a valid message
├── Fenced                   index.redis.commands: another writer has taken over a pod
├── IndexUnavailable
│   └── ScriptsRefused         index.redis.store: the server does not run scripts for this user
├── TokenizeError
│   ├── NeedsThread            prompt.encoders: the text must be encoded in a thread
│   ├── Abandoned              prompt.effort: the work took too long, or nobody waits for it
│   ├── TooMuch                prompt.bounds: the request has too much in it to be decoded
│   ├── PromptRefused          prompt.remote: an engine refuses to tokenize the prompt
│   └── TokensLate             prompt.late: the token ids have not come in time
├── ExaminationFailed        dashboard.examination: the doctor could not be run, or found no end
├── AttemptFailed            gateway.pod_connection: a pod sent no answer, or not all of it
├── CannotListen             feedtools.listen: the address of an endpoint is invalid
├── CaptureError             feedtools.capture: a file is not a capture, or has nothing to check
├── CaptureFileError         feedtools.capture_file: a file cannot be read or written, or is not JSON lines
├── ProbeFailed              doctor.probe: an engine did not compute a probe
├── TraceError               study.formats: a file is no trace that can be replayed
├── CalibrationError         study.calibration.fit: an engine cannot be calibrated
└── CannotExplain            cli.explain: the gateway cannot be asked, or does not know the request

zmq.ZMQError
└── Unresolved               kvevents.connect: the host name of an endpoint cannot be resolved; handled as any ZMQError

jinja2.SecurityError
└── TooLong                  prompt.template_limits: a chat template makes something that is too large

Exceptions with a leading underscore never leave their module and are not listed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for data from elsewhere that is not what was expected."""


_SHORTAGES = {
    errno.EMFILE: "this process has no free file descriptor",
    errno.ENFILE: "this machine has no free file descriptor",
    errno.ENOBUFS: "this machine has no memory for another connection",
    errno.ENOMEM: "this machine has no memory for another connection",
    errno.EADDRNOTAVAIL: "this machine has no free port, or no address of that kind, to connect from",
}


def shortage_in(error: BaseException | None) -> str | None:
    """What this process or its machine has run out of, if that is why `error` was raised; None if the other side is to blame."""
    while error is not None:
        for each in (error, getattr(error, "os_error", None)):
            words = _SHORTAGES.get(getattr(each, "errno", None) or 0)
            if words is not None:
                return words
        error = error.__cause__ or error.__context__
    return None


def message_of(error: BaseException) -> str:
    """The message of a foreign error, which may be unable to give one."""
    try:
        return str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # Supervision boundary: `__str__` is someone's code.
        return "(its message cannot be read)"


def client_error(error: Exception) -> str:
    """What happened, from an HTTP client's error. aiohttp writes `ssl:default` also where no TLS is used."""
    text = re.sub(r" ssl:(default|<[^>]*>)", "", str(error)) or type(error).__name__
    return f"{text}: does it speak plain HTTP?" if "WRONG_VERSION_NUMBER" in text else text


class MatrixInferError(Exception):
    """The base class of all errors of this package."""


class ConfigError(MatrixInferError):
    """The configuration is wrong.

    `path` is the path of the key, such as `$.pods[0].url`; `message` says what was expected there.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


class RequestError(MatrixInferError):
    """The client's request cannot be served as sent. `param` names the invalid field, if there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(RequestError):
    """The request is malformed JSON, or has a missing field or a field of the wrong type."""


class Unauthenticated(RequestError):
    """The request has no valid API key or token."""


class Forbidden(RequestError):
    """The request's API key or token does not allow it."""


class LimitExceeded(RequestError):
    """The caller has used up what it may use. `headers` say how much that is, and when there is more."""

    def __init__(self, message: str, *, kind: str, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.kind = kind
        self.headers = headers


class UnknownModel(RequestError):
    """No pod serves the requested model, and it is not configured."""


class UnknownResponse(RequestError):
    """No pod is known to store the response that the request is about."""


class PayloadTooLarge(RequestError):
    """The request body exceeds the configured limit."""


class UnsupportedBody(RequestError):
    """The request body is encoded in a way that the gateway does not read."""


class BodyTimeout(RequestError):
    """The request body did not arrive completely within the configured time."""


class RoutingError(MatrixInferError):
    """The request is fine, but no pod can take it."""


class NoPodAvailable(RoutingError):
    """No pod serves the requested model now."""


class KeysUnavailable(RoutingError):
    """The public keys that tokens are checked with cannot be read now."""


class Overloaded(RoutingError):
    """This process has no room for another request now: no memory for bodies, no file descriptor, no place in the queue.

    `retry_after` is when there may be, in seconds; None if that is not known.
    """

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PodUnreachable(RoutingError):
    """Every pod that was tried refused or broke the connection before its first byte."""


class PodTimeout(RoutingError):
    """A pod did not answer within the request's deadline."""


class TokenizeError(MatrixInferError):
    """A prompt cannot be turned into the engine's token ids."""


class UnknownPod(MatrixInferError):
    """The library's index follows no pod of that name: `Index.follow` it first."""


class IndexUnavailable(MatrixInferError):
    """The block index did not answer, or not in time."""


class PluginError(MatrixInferError):
    """A scheduler plugin is unknown, misconfigured, or returned what the contract forbids."""
