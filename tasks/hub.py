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
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tasks.errors import AccessError, MissingError, TransientError


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Run a Hub call; on failure raise the error of ours that names `doing`, the cause and the way out."""
    try:
        yield
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError: first
        raise AccessError(
            f"{doing}: the repository is gated; accept its terms on its Hub page with this account"
        ) from error
    except RevisionNotFoundError as error:
        raise MissingError(f"{doing}: no such revision; name an existing branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        if _status(error) == 401:
            raise AccessError(
                f"{doing}: 401, it is not there or this token may not see it; check the name and HF_TOKEN"
            ) from error
        raise MissingError(f"{doing}: 404, it does not exist (or is private and HF_TOKEN is not set)") from error
    except LocalTokenNotFoundError as error:
        raise AccessError(f"{doing}: no token; set HF_TOKEN or the Hub Account block") from error
    except HfHubHTTPError as error:
        raise _of_status(doing, _status(error), error) from error
    except (ConnectionError, TimeoutError) as error:
        raise TransientError(
            f"{doing}: the Hub can't be reached ({type(error).__name__}); is this machine online?"
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "httpx":  # huggingface_hub lets its client's errors through
            raise TransientError(
                f"{doing}: the Hub can't be reached ({type(error).__name__}); is this machine online?"
            ) from error
        raise


def _status(error: HfHubHTTPError) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0) or 0


def _of_status(doing: str, status: int, error: HfHubHTTPError) -> Exception:
    if status == 401:
        return AccessError(f"{doing}: 401, the token is wrong or expired; make a new one and set HF_TOKEN")
    if status == 403:
        return AccessError(f"{doing}: 403, the token is valid but lacks this right; it needs write access")
    if status == 404:
        return MissingError(f"{doing}: 404, not found")
    if status in {408, 429} or status >= 500:
        return TransientError(f"{doing}: the Hub answered {status}; it is retried")
    return AccessError(f"{doing}: the Hub refused with {status} ({error.server_message or 'no message'})")


def pin_commit(hub: HfApi, repo_id: str, revision: str, repo_type: str) -> str:
    """Return the commit that `revision` points at now, so that a moving branch names an exact input."""
    with hub_errors(f"{repo_type} {repo_id}@{revision}"):
        sha = hub.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    if sha is None:
        raise MissingError(f"{repo_type} {repo_id}@{revision}: the Hub named no commit; name one")
    return sha
