"""Which failures are worth another try; every class of ours is also a standard one."""

import errno
from types import SimpleNamespace

import httpx
import pytest

from tasks import errors as subject
from tasks.errors import TataraError

OURS = {
    subject.SpecError: ValueError,
    subject.DataError: ValueError,
    subject.ShapeError: ValueError,
    subject.AccessError: PermissionError,
    subject.MissingError: FileNotFoundError,
    subject.CapacityError: OSError,
    subject.OutOfMemoryError: MemoryError,
    subject.CorruptError: ValueError,
    subject.PortTakenError: OSError,
    subject.TrainingError: RuntimeError,
    subject.ServiceError: RuntimeError,
    subject.AttestationError: RuntimeError,
    subject.PromotionError: RuntimeError,
    subject.GateError: RuntimeError,
    subject.TransientError: ConnectionError,
    subject.TokenError: subject.AccessError,
    subject.RightsError: subject.AccessError,
    subject.GatedError: subject.AccessError,
    subject.RolloutError: subject.TrainingError,
    subject.RewardError: subject.TrainingError,
    subject.LostError: subject.TrainingError,
    subject.StorageFullError: subject.CapacityError,
    subject.UnavailableError: subject.TransientError,
    subject.RateLimitError: subject.TransientError,
}


def test_table_above_is_complete():
    defined = {cls for cls in vars(subject).values() if isinstance(cls, type) and issubclass(cls, TataraError)}
    assert defined == {*OURS, TataraError}


@pytest.mark.parametrize("cls", OURS)
def test_ours_are_standard_errors_and_only_transient_ones_are_retried(cls: type[TataraError]):
    error = cls("value, expectation, way out")
    assert isinstance(error, OURS[cls])
    assert str(error) == "value, expectation, way out"
    assert subject.is_transient(error) is issubclass(cls, subject.TransientError)


def _answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://x")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("status", "again"),
    [(status, False) for status in (400, 401, 403, 404, 501)]
    + [(status, True) for status in (408, 429, 500, 502, 503, 504)],
)
def test_http_status_decides(status: int, again: bool):
    assert subject.is_transient(_answer(status)) is again


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EHOSTUNREACH, "No route to host"), True),
        (FileNotFoundError("x"), False),
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("slow"), True),
        (MemoryError(), False),
        (ValueError("x"), False),
        (KeyError("x"), False),
        (TimeoutError(), True),
        (BrokenPipeError(), True),
    ],
)
def test_other_errors(error: BaseException, again: bool):
    assert subject.is_transient(error) is again


def test_prefects_question():
    asked = [subject.TransientError("503"), subject.SpecError("rank"), "no exception", None]
    assert [subject.is_worth_retrying(None, None, SimpleNamespace(data=data)) for data in asked] == [
        True,
        False,
        False,
        False,
    ]
