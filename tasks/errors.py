"""The exception tree, and the one question Prefect asks of it: is another try worth it?

Each class is also a standard-library error, so that code which knows nothing of Tatara can
still catch it. A message names the value, what was expected and the way out.

Ring: pure.
"""

import errno
from typing import Any


class TataraError(Exception):
    """Base of every error that Tatara raises on purpose."""


class SpecError(TataraError, ValueError):
    """A knob, a recipe or a flag is wrong. Asking again changes nothing."""


class DataError(TataraError, ValueError):
    """A data set or one of its rows can't be used."""


class ShapeError(TataraError, ValueError):
    """Tensors, headers or adapters do not fit each other."""


class AccessError(TataraError, PermissionError):
    """A credential is missing (401) or lacks a right (403)."""


class TokenError(AccessError):
    """No token, or one that is wrong or expired (401)."""


class RightsError(AccessError):
    """A valid token that lacks a right (403): read-only, another owner, too small a scope."""


class GatedError(AccessError):
    """A repository whose terms this account has not accepted."""


class MissingError(TataraError, FileNotFoundError):
    """A model, data set, file or artifact that was asked for is not there."""


class CapacityError(TataraError, OSError):
    """Too little disk or memory; the message says how much is needed and how much there is."""


class StorageFullError(CapacityError):
    """The account's storage on the Hub is used up. No retry makes room."""


class OutOfMemoryError(TataraError, MemoryError):
    """A step ran out of memory. Never retried blindly: the same step would fail again."""


class CorruptError(TataraError, ValueError):
    """Bytes on disk or on the wire are not what their manifest, header or digest says."""


class PortTakenError(TataraError, OSError):
    """Another process listens on a port that a service needs."""


class TrainingError(TataraError, RuntimeError):
    """The trainer stopped without a usable result (NaN, crash, nothing moved)."""


class RolloutError(TrainingError):
    """What generates the rollouts failed, or was another model than the one that learns; another engine may do it."""


class RewardError(TrainingError):
    """A reward failed, or gave what is no score. Another engine would meet the same."""


class LostError(TrainingError):
    """The trainer's process died without a word: killed, crashed, or ended by the kernel for want of memory."""


class ServiceError(TataraError, RuntimeError):
    """A service did not start, or died; the message carries the last lines of its log."""


class AttestationError(TataraError, RuntimeError):
    """The served model is not the model that was trained."""


class GateError(TataraError, RuntimeError):
    """The candidate did not pass the evaluation gate: it is not promoted. Asking again changes nothing."""


class PromotionError(TataraError, RuntimeError):
    """A new model was not promoted: it did worse than the one that serves, or a person said no."""


class TransientError(TataraError, ConnectionError):
    """The world was away for a moment: a timeout, a 429, a 5xx. Worth another try."""


class UnavailableError(TransientError):
    """A server answered 5xx, or another one got in between (408, 412, 425)."""


class RateLimitError(TransientError):
    """Too many requests (429); `retry_after_s` is what the server asked for, 0 when it did not say."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


_TRANSIENT_ERRNO = frozenset(
    {errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EAGAIN}
)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


def is_transient(error: BaseException) -> bool:
    """Say whether the same call may succeed later.

    Ours decide by class. Errors of the HTTP clients (httpx, requests, huggingface_hub) carry a
    response: 408, 425, 429 and 5xx are transient, every other status is final.

    >>> is_transient(TransientError("503 from the Hub")), is_transient(SpecError("rank must be > 0"))
    (True, False)
    >>> is_transient(MemoryError()), is_transient(ConnectionResetError()), is_transient(TimeoutError())
    (False, True, True)
    """
    if isinstance(error, TataraError):
        return isinstance(error, TransientError)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _TRANSIENT_STATUS
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT_ERRNO
    return type(error).__name__ in {"ConnectError", "ReadError", "ReadTimeout", "ConnectTimeout", "RemoteProtocolError"}


def is_worth_retrying(task: Any, task_run: Any, state: Any) -> bool:  # Any: Prefect's types; errors knows no Prefect
    """Prefect's `retry_condition_fn`: retry only what may pass by itself."""
    return isinstance(state.data, Exception) and is_transient(state.data)
