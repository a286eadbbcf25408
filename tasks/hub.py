"""One place that turns the Hub client's exceptions into ours, so that each verb says the same.

401 is a wrong token, 403 a token without the right, 404 a name that is not there (or private),
429 and 5xx are weather.

Ring: edge (reads environment, talks to the Hub through huggingface_hub).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tasks.errors import AccessError, MissingError, SpecError, TataraError, TransientError

_CLIENT_MODULES = frozenset({"httpx", "httpx2"})  # huggingface_hub 2.4 moved to httpx2


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Run a Hub call; on failure raise the error of ours that names `doing`, the cause and the way out."""
    try:
        yield
    except TataraError:
        raise
    except Exception as error:
        ours = _translate(doing, error)
        if ours is None:
            raise
        raise ours from error


def _translate(doing: str, error: BaseException | None) -> TataraError | None:
    """Return our error for the first one of the chain that tells what went wrong.

    The client wraps: a failed upload is a RuntimeError, a failed snapshot a LocalEntryNotFoundError; the
    answer of the Hub is their cause.
    """
    while error is not None:
        ours = _of_response(doing, error) if isinstance(error, HfHubHTTPError) else _of_client(doing, error)
        if ours is not None:
            return ours
        error = error.__cause__
    return None


def _of_client(doing: str, error: BaseException) -> TataraError | None:
    """Errors without an answer of the Hub."""
    if isinstance(error, HFValidationError):
        return SpecError(f"{doing}: that is no name of a Hub repository, expected owner/name ({error})")
    if isinstance(error, LocalTokenNotFoundError):
        return AccessError(f"{doing}: no token; set HF_TOKEN or the Hub Account block")
    if isinstance(error, OfflineModeIsEnabled):  # a ConnectionError that no retry mends
        return MissingError(f"{doing}: HF_HUB_OFFLINE is set; unset it, or name a local folder or file")
    if type(error).__module__.partition(".")[0] == "hf_xet" and isinstance(error, PermissionError):
        return AccessError(f"{doing}: the Hub's storage refused the token; it needs write access")
    is_short = isinstance(error, OSError) and str(error).startswith("Consistency check failed")
    from_client = type(error).__module__.partition(".")[0] in _CLIENT_MODULES
    if is_short or from_client or isinstance(error, (ConnectionError, TimeoutError)):
        return TransientError(f"{doing}: the Hub can't be reached ({type(error).__name__}); is this machine online?")
    return None


def _of_response(doing: str, error: HfHubHTTPError) -> TataraError:
    status = getattr(getattr(error, "response", None), "status_code", 0) or 0
    if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError: first
        return AccessError(f"{doing}: the repository is gated; accept its terms on its Hub page with this account")
    if isinstance(error, RevisionNotFoundError):
        return MissingError(f"{doing}: no such revision; name an existing branch, tag or commit")
    if isinstance(error, RepositoryNotFoundError):
        if status == 401:
            return AccessError(
                f"{doing}: 401, it is not there or this token may not see it; check the name and HF_TOKEN"
            )
        return MissingError(f"{doing}: 404, it does not exist (or is private and HF_TOKEN is not set)")
    return _of_status(doing, status, error)


def _of_status(doing: str, status: int, error: HfHubHTTPError) -> TataraError:
    if status == 401:
        return AccessError(f"{doing}: 401, the token is wrong or expired; make a new one and set HF_TOKEN")
    if status == 403:
        return AccessError(f"{doing}: 403, the token is valid but lacks this right; it needs write access")
    if status == 404:
        return MissingError(f"{doing}: 404, not found")
    if status in {408, 429} or status >= 500:
        return TransientError(f"{doing}: the Hub answered {status}; it is retried")
    return AccessError(f"{doing}: the Hub refused with {status} ({error.server_message or 'no message'})")


def require_writer(hub: HfApi, doing: str) -> str:
    """Return the account behind the token. Raises AccessError: 401 for a wrong one, 403 for a read-only one.

    `create_repo(exist_ok=True)` succeeds with a read-only token when the repo is there, so ask first.
    A fine-grained token shows its rights only when it writes.
    """
    with hub_errors(doing):
        account = hub.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise AccessError(f"{doing}: 403, the token of {account['name']} is read-only; it needs write access")
    return account["name"]


def pin_commit(hub: HfApi, repo_id: str, revision: str, repo_type: str) -> str:
    """Return the commit that `revision` points at now, so that a moving branch names an exact input."""
    with hub_errors(f"{repo_type} {repo_id}@{revision}"):
        info = hub.repo_info(repo_id, revision=revision, repo_type=repo_type)
        if getattr(info, "gated", False):  # its description is public, its files are not: ask before the long work
            hub.auth_check(repo_id, repo_type=repo_type)
    sha = info.sha
    if sha is None:
        raise MissingError(f"{repo_type} {repo_id}@{revision}: the Hub named no commit; name one")
    return sha
