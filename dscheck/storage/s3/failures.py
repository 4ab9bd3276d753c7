"""What botocore raises, in our words: where, why, what to do, and whether the same call may succeed later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)

from dscheck.errors import CheckpointNotFoundError, StorageError, TransientStorageError

_MISSING = {"NoSuchKey", "404", "NotFound"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_LATER = {
    "SlowDown",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestTimeout",
    "InternalError",
    "OperationAborted",
    # Of a conditional put while another one, or a delete, is under way: not yet decided.
    "ConditionalRequestConflict",
}
_LATER_STATUS = {408, 429, 500, 502, 503, 504}
_CONNECTION = (ConnectionError, HTTPClientError, ReadTimeoutError, ResponseStreamingError, IncompleteReadError)

_FULL = "no space left"
"""What servers say in their own words, as an internal error: later is no better."""

_RIGHTS = "check the credentials (environment, ~/.aws, storage_options) and what they may do with this bucket"
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct the root",
    "AccessDenied": _RIGHTS,
    "403": _RIGHTS + "; without the right to list it, a key that is not there shows as forbidden",
    "InvalidAccessKeyId": _RIGHTS,
    "SignatureDoesNotMatch": _RIGHTS,
    "InvalidToken": _RIGHTS,
    "ExpiredToken": "the credentials have expired, and those found anew have too: log in again",
    "NoCredentialsError": "give credentials: environment, ~/.aws, storage_options, or anon=True",
    "EntityTooLarge": "the store takes no part of this size: set part_bytes in storage_options",
}


class ExpiredCredentialsError(StorageError):
    """The store no longer takes the credentials that the client was made with."""


def code_of(error: Exception) -> str:
    """`NoSuchKey`, `412`, ...; the name of the class for what no server said."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", "unknown"))
    return type(error).__name__


def status_of(error: Exception) -> int:
    """The HTTP status; 0 for what no server said."""
    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


@contextmanager
def reporting(doing: str, url: str, key: str) -> Iterator[None]:
    """What botocore or the connection raises inside is raised as CheckpointNotFoundError, TransientStorageError,
    ExpiredCredentialsError or StorageError.
    """
    try:
        yield
    except (BotoCoreError, ClientError, HTTPException, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise _translated(error, doing, url, key) from error


def _translated(error: Exception, doing: str, url: str, key: str) -> Exception:
    code, where = code_of(error), f"{url}/{key}".rstrip("/")
    if code in _MISSING:
        return CheckpointNotFoundError(f"there is no object '{where}'", url=url, key=key)
    # The server's words and not the whole answer, which may repeat what was signed.
    said = error.response.get("Error", {}).get("Message") if isinstance(error, ClientError) else str(error)
    full = _FULL in str(said).lower()
    advice = "the server has no room: free some there" if full else _ADVICE.get(code)
    text = f"cannot {doing} '{where}': {code}: {said}" + (f"; {advice}" if advice else "")
    return (StorageError if full else _kind(error, code))(text, url=url, key=key)


def _kind(error: Exception, code: str) -> type[StorageError]:
    if code in _EXPIRED:
        return ExpiredCredentialsError
    if isinstance(error, ClientError):
        return TransientStorageError if code in _LATER or status_of(error) in _LATER_STATUS else StorageError
    connection = isinstance(error, (*_CONNECTION, HTTPException)) or not isinstance(error, BotoCoreError)
    return TransientStorageError if connection and not isinstance(error, SSLError) else StorageError
