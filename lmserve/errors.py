"""Every exception that crosses a border between two rooms, in one tree.

LMServeError
├── ConfigError              the person starting the server made a mistake: one line, exit code 3
├── RequestError             the client's request is at fault: refused before the queue
│   ├── InvalidRequest       a field is missing, malformed or out of range
│   ├── UnsupportedField     a field that lmserve knows of and does not honour (yet)
│   ├── ContextLengthExceeded
│   ├── PromptTooLong        longer than this server is configured to take
│   ├── InputTooLong         a text or pair is longer than the encoder takes
│   ├── ModelNotFound
│   ├── JobNotFound          no download has this id
│   └── DownloadRefused      a download that cannot be: no access, no space, no network allowed
├── Unavailable              try again later
│   ├── QueueFull
│   ├── FirstTokenTimeout    it waited too long for its first token
│   ├── InsufficientMemory   the model does not fit beside what is loaded
│   ├── ModelUnloaded        somebody unloaded the model meanwhile
│   ├── HubUnreachable       the place that models are downloaded from
│   └── NotReady             starting, draining, or the worker is being started again
└── EngineError              our fault, or the machine's
    ├── ModelLoadFailed
    ├── WorkerDied
    ├── StepFailed           one engine step failed; the requests in it are lost, the engine lives on
    └── RequestFailed        this very request cannot be served, and would fail again

Which HTTP status and which OpenAI ``type`` and ``code`` each becomes stands in one table, ``lmserve/api/errors.py``.
"""

from __future__ import annotations


class LMServeError(Exception):
    """Root of the tree. ``str(error)`` is a sentence fit for the client."""


class ConfigError(LMServeError):
    """A configuration that cannot be run."""


class RequestError(LMServeError):
    """The request is refused. ``param`` is the path of the field at fault, as the client wrote it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field is missing, of the wrong type, or out of range."""


class UnsupportedField(RequestError):
    """A documented field whose meaning lmserve does not offer."""


class ContextLengthExceeded(RequestError):
    """Prompt and asked-for output together are longer than the context, or than the KV cache."""

    def __init__(self, *, limit: int, num_prompt_tokens: int, max_tokens: int, param: str = "messages") -> None:
        asked = f"{num_prompt_tokens} in the prompt and {max_tokens} for the output"
        super().__init__(
            # The first words are OpenAI's: clients (litellm is one) know the error by them.
            f"This model's maximum context length is {limit} tokens. However, {num_prompt_tokens + max_tokens} were "
            f"asked for ({asked}). Shorten the prompt or lower max_tokens.",
            param,
        )
        self.limit = limit
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens


class PromptTooLong(RequestError):
    """The prompt is longer than the configuration allows, whatever the model could take."""

    def __init__(self, *, limit: int, num_prompt_tokens: int, param: str) -> None:
        super().__init__(f"{param}: the prompt has {num_prompt_tokens} tokens, and this server takes {limit}.", param)


class InputTooLong(RequestError):
    """One of an encoder's inputs is longer than it takes: it is never cut unless that is asked for."""

    def __init__(self, *, limit: int, num_tokens: int, param: str) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, {param} has {num_tokens} tokens. Shorten "
            "it, or allow it to be cut (truncate_prompt_tokens: -1).",
            param,
        )


class ModelNotFound(RequestError):
    """No loaded model answers to the name."""


class JobNotFound(RequestError):
    """No download has the id, or it was forgotten."""


class DownloadRefused(RequestError):
    """The server may not download the model, or has no space for it."""


class Unavailable(LMServeError):
    """The server cannot take the request now. ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Unavailable):
    """More requests wait than the configuration allows."""


class FirstTokenTimeout(Unavailable):
    """The request waited too long for its first token, and was given up."""


class InsufficientMemory(Unavailable):
    """The model does not fit into the memory that is free, and nothing may be unloaded for it."""


class ModelUnloaded(Unavailable):
    """The model was unloaded while the request ran or waited."""


class HubUnreachable(Unavailable):
    """The hub that models are downloaded from cannot be reached, or is out of order."""


class NotReady(Unavailable):
    """The server or the model's worker is starting, draining or being started again."""


class EngineError(LMServeError):
    """Nothing the client did."""


class ModelLoadFailed(EngineError):
    """The worker could not load the model; the message is the reason."""


class WorkerDied(EngineError):
    """The model's worker process ended while the request ran."""


class StepFailed(EngineError):
    """The engine step that held the request failed."""


class RequestFailed(EngineError):
    """The engine cannot serve this very request, although nothing in it was wrong; it would fail again."""
