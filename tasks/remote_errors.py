"""Name what an object store refused: login, rights, bucket, room, settings, or only this moment.

Ring: pure.
"""

import errno

from tasks.errors import CapacityError, MissingError, RightsError, SpecError, TataraError, TokenError, TransientError

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}


def translate_error(error: Exception, doing: str, url: str) -> TataraError:
    """Return ours for what an fsspec file system raised while `doing` something to `url`.

    What has no other name may pass by itself. botocore's classes are told by their names: it may not be installed.
    """
    said = f"{doing} {url}: {type(error).__name__}: {error}"
    if type(error).__name__ in _NO_CREDENTIALS:
        return TokenError(f"{said}: give the worker credentials (AWS_ACCESS_KEY_ID, ...) or the block's options")
    if isinstance(error, PermissionError):
        return RightsError(f"{said}: the account must list, read, write and delete there")
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{said}: make the bucket first")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(f"{said}: free some space")
    if isinstance(error, (TypeError, ValueError)):  # s3fs looks at most options when it is first used
        return SpecError(f"{said}: look at the URL and at the block's options")
    return TransientError(f"{said}: if it stays away, look at the network and the address (AWS_ENDPOINT_URL)")
