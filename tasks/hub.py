"""One place that turns the Hub client's exceptions into ours, so that each verb says the same.

    401 TokenError   403 RightsError, GatedError, StorageFullError   404 MissingError     final
    429 RateLimitError (with its Retry-After)   408, 412, 5xx UnavailableError             worth another try
    no answer at all: TransientError

Ring: edge (reads environment, talks to the Hub through huggingface_hub).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id

from tasks.errors import (
    AccessError,
    GatedError,
    MissingError,
    RateLimitError,
    RightsError,
    SpecError,
    StorageFullError,
    TataraError,
    TokenError,
    TransientError,
    UnavailableError,
)
from tasks.specs import PublishSpec

_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
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
        return TokenError(f"{doing}: no token; set HF_TOKEN or the Hub Account block")
    if isinstance(error, OfflineModeIsEnabled):  # a ConnectionError that no retry mends
        return MissingError(f"{doing}: HF_HUB_OFFLINE is set; unset it, or name a local folder or file")
    if type(error).__module__.partition(".")[0] == "hf_xet" and isinstance(error, PermissionError):
        return RightsError(f"{doing}: the Hub's storage refused the token; it needs write access")
    if told := _XET_STATUS.search(str(error)) if isinstance(error, ConnectionError) else None:
        return _of_xet(doing, int(told[1]))
    is_short = isinstance(error, OSError) and str(error).startswith("Consistency check failed")
    if isinstance(error, ValueError) and str(error).startswith("LFS batch API returned errors"):
        return AccessError(f"{doing}: the Hub's storage refused a file ({' '.join(str(error).split())})")
    from_client = type(error).__module__.partition(".")[0] in _CLIENT_MODULES
    if is_short or from_client or isinstance(error, (ConnectionError, TimeoutError)):
        return TransientError(f"{doing}: the Hub can't be reached ({type(error).__name__}); is this machine online?")
    return None


def _of_xet(doing: str, status: int) -> TataraError:
    """hf_xet calls each refusal a ConnectionError and keeps only the status, not what the Hub said."""
    if status == 401:
        return TokenError(f"{doing}: 401, the Hub's storage does not know the token; make a new one and set HF_TOKEN")
    if status == 403:
        return RightsError(
            f"{doing}: 403, the Hub's storage refused: the token lacks write access, or the account's storage is full"
        )
    if status == 429:
        return RateLimitError(f"{doing}: the Hub's storage answered 429, too many requests; it is retried later")
    if status in {408, 425} or status >= 500:
        return UnavailableError(f"{doing}: the Hub's storage answered {status}; it is retried")
    return AccessError(f"{doing}: the Hub's storage refused with {status}; HF_HUB_DISABLE_XET=1 sends without it")


def _of_response(doing: str, error: HfHubHTTPError) -> TataraError:
    status = getattr(getattr(error, "response", None), "status_code", 0) or 0
    if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError: first
        return GatedError(f"{doing}: the repository is gated; accept its terms on its Hub page with this account")
    if isinstance(error, RevisionNotFoundError):
        return MissingError(f"{doing}: no such revision; name an existing branch, tag or commit")
    if isinstance(error, RepositoryNotFoundError):
        if status == 401:
            return TokenError(
                f"{doing}: 401, it is not there or this token may not see it; check the name and HF_TOKEN"
            )
        return MissingError(f"{doing}: 404, it does not exist (or is private and HF_TOKEN is not set)")
    return _of_status(doing, status, error)


def _of_status(doing: str, status: int, error: HfHubHTTPError) -> TataraError:
    told = error.server_message or "no message"
    if status in {402, 403, 413, 507} and "storage" in told.lower():  # it says so in words only: hub issues 3049, 3325
        return StorageFullError(
            f"{doing}: {status}, the account's storage on the Hub is full ({told}): delete old repositories or "
            "revisions there, enlarge its plan, or publish to another owner"
        )
    if status == 401:
        return TokenError(f"{doing}: 401, the token is wrong or expired; make a new one and set HF_TOKEN")
    if status == 403:
        return RightsError(f"{doing}: 403, the token is valid but lacks this right; it needs write access ({told})")
    if status == 404:
        return MissingError(f"{doing}: 404, not found")
    if status == 429:
        return _of_rate_limit(doing, error)
    if status in {408, 425} or status >= 500:
        return UnavailableError(f"{doing}: the Hub answered {status}; it is retried")
    if status == 412:
        return UnavailableError(f"{doing}: 412, another commit came in between; it is retried on top of that one")
    return AccessError(f"{doing}: the Hub refused with {status} ({told})")


def _of_rate_limit(doing: str, error: HfHubHTTPError) -> RateLimitError:
    """Read how long to wait from Retry-After, else from the Hub's own RateLimit header."""
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    asked = headers.get("retry-after", "").strip()  # a date is allowed too; the Hub sends seconds
    seconds = int(asked) if asked.isdecimal() else limit.reset_in_seconds if limit and limit.remaining == 0 else 0
    wait = f"in {seconds} s" if seconds else "later"
    return RateLimitError(f"{doing}: the Hub answered 429, too many requests; it is retried {wait}", seconds)


def find_repo(spec: PublishSpec) -> str:
    """Return the repo that a model is published to: the recipe's, else HF_REPO_NAME, else "".

    Raises: SpecError when its form is wrong.
    """
    name = "PublishSpec.repo_id" if spec.repo_id else "HF_REPO_NAME"
    repo_id = spec.repo_id or os.environ.get("HF_REPO_NAME", "")
    if not repo_id:
        return ""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SpecError(f"{name} = {repo_id!r} is not owner/name: {error}") from None
    if "/" not in repo_id:
        raise SpecError(f"{name} = {repo_id!r} is not owner/name: put its owner in front")
    return repo_id


def require_target(hub: HfApi, repo_id: str, doing: str, *, private: bool, create_pr: bool = False) -> str:
    """Return the account that may publish to `repo_id`; nothing is created.

    For a pull request the repo's own write right is not needed, only a token that may write.
    Raises: TokenError for a wrong token, RightsError for one that may not write there, AccessError for a public
        repo where a private one is wanted; TransientError.
    """
    account = _find_writer(hub, doing)
    info = find_model(hub, repo_id, doing)
    if info is None:
        if reason := lacking_right(account, repo_id):
            raise RightsError(
                f"{doing}: 403, {repo_id} is not there and can't be made: {reason}; choose another owner, or a token "
                "with write access"
            )
        return account["name"]
    refuse_public(info, doing, private=private)
    if not create_pr:
        _require_write(hub, account, repo_id, doing)
    return account["name"]


def _require_write(hub: HfApi, account: dict[str, Any], repo_id: str, doing: str) -> None:  # Any: whoami's answer
    """Ask the Hub whether this token may write to a repo that is there."""
    try:
        with hub_errors(doing):
            hub.auth_check(repo_id, write=True)
    except MissingError:  # a Hub that does not know this question: what whoami says of the token has to do
        if reason := lacking_right(account, repo_id, is_there=True):
            raise RightsError(f"{doing}: 403, no write access to {repo_id}: {reason}") from None


def find_model(hub: HfApi, repo_id: str, doing: str, revision: str | None = None) -> ModelInfo | None:
    """Return what the Hub says of a model at a branch, None when it is not there."""
    try:
        with hub_errors(doing):
            return hub.model_info(repo_id, revision=revision)
    except MissingError:
        return None


def refuse_public(info: ModelInfo, doing: str, *, private: bool) -> None:
    """Raise AccessError for a public repo where a private one is wanted: `create_repo` leaves it public."""
    if private and not info.private:
        raise AccessError(
            f"{doing}: the repo exists and is public, but PublishSpec.private is true: make it private on its Hub "
            "page, choose another repo, or set publish.private to false"
        )


def lacking_right(account: dict[str, Any], repo_id: str, *, is_there: bool = False) -> str:  # Any: whoami's answer
    """Return why this token can't make a repo, or write to one that is there; "" when nothing speaks against it.

    Source: huggingface.co/docs/hub/organizations-security (roles) and security-tokens (fine-grained ones).

    >>> lacking_right({"name": "ada", "orgs": [{"name": "lab", "roleInOrg": "read"}]}, "lab/model")
    "ada's role in lab is read"
    >>> lacking_right({"name": "ada"}, "Ada/model")
    ''
    """
    owner = repo_id.partition("/")[0].lower()
    roles = {org["name"].lower(): org.get("roleInOrg", "") for org in account.get("orgs", [])}
    if owner != account["name"].lower() and owner not in roles:
        return f"the token is of {account['name']}, who is in {', '.join(sorted(roles)) or 'no organisation'}"
    if roles.get(owner) == "read":
        return f"{account['name']}'s role in {owner} is read"
    scopes = (account.get("auth", {}).get("accessToken", {}).get("fineGrained") or {}).get("scoped")
    named = {owner, repo_id.lower()} if is_there else {owner}
    if scopes is not None and not any(_may_write(scope, named) for scope in scopes):
        return f"the fine-grained token has no write access to {repo_id if is_there else f'the repos of {owner}'}"
    return ""


def _may_write(scope: dict[str, Any], named: set[str]) -> bool:  # Any: whoami's answer
    """Say whether a scope of a fine-grained token covers one of these owners or repos."""
    entity = scope.get("entity", {})
    is_named = entity.get("type") in {"user", "org", "model"} and entity.get("name", "").lower() in named
    is_unknown = entity.get("type") not in {"user", "org", "model", "dataset", "space", "collection"}
    return "repo.write" in scope.get("permissions", []) and (is_named or is_unknown)


def _find_writer(hub: HfApi, doing: str) -> dict[str, Any]:  # Any: whoami's answer
    """`create_repo(exist_ok=True)` succeeds with a read-only token when the repo is there, so ask first."""
    with hub_errors(doing):
        account = hub.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise RightsError(f"{doing}: 403, the token of {account['name']} is read-only; it needs write access")
    return account


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
