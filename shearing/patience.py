"""Storage that fails for a moment: what is tried again, for how long, and what is said where that does not help."""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow.fs as pafs

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
# What a storage says of a file or of itself, which no second try would change.
ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
REFUSED = re.compile(
    r"HTTP status (?!408|429)4\d\d|AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|"
    r"SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|VALIDATION)"
)
# Tries of pyarrow's own client, with waits that grow to 20 s: of a call that is made again from outside, and of streams
# and uploads, which cannot be (10 tries: 57 to 96 s). Its 3 s for an answer are too few for a store that is busy.
CALL_TRIES, STREAM_TRIES = 3, 10
CONNECT_WITHIN_S, ANSWER_WITHIN_S = 5.0, 10.0

Result = TypeVar("Result")


class StorageError(OSError):
    """A storage that refused, or that went on failing for longer than is waited for. Says what failed, and why."""


def patiently(operation: Callable[[], Result], what: str, patience_s: float = PATIENCE_S) -> Result:
    """What `operation` returns, tried again while its storage fails, if that can pass.

    Args:
        operation: Safe to do twice: also where it was done and only the answer was lost.
        what: Names it, as in `reading s3://bucket/x`.
        patience_s: No try begins later than so many seconds after the first; 0 is for one try alone.

    Raises:
        StorageError: It went on failing, or the storage refused.
        OSError: One of ANSWERS, at once.
    """
    began_s, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            result = operation()
        except ANSWERS:
            raise
        except StorageError:  # of an operation within this one, which has been waited for
            raise
        except OSError as error:
            reason, waited_s = _reason(error), time.monotonic() - began_s
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1))
            if REFUSED.search(str(error)):
                raise StorageError(f"{what} was refused: {reason}") from error
            if waited_s + wait_s > patience_s:
                raise StorageError(f"{what} failed {_tries(tries)} in {waited_s:.0f} s: {reason}") from error
            if tries == 1:
                logger.warning("%s failed (%s); tried again for up to %.0f s", what, reason, patience_s)
            time.sleep(wait_s)
        else:
            if tries > 1:
                logger.warning("%s went well after %.0f s, at try %d", what, time.monotonic() - began_s, tries)
            return result


def _reason(error: OSError) -> str:
    """The first line of what a storage said."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _tries(tries: int) -> str:
    return "once" if tries == 1 else f"{tries} times"


class S3(pafs.S3FileSystem):
    """pyarrow's S3 with other limits, which it keeps where it is sent to another process: pyarrow's own forgets them.

    Files of one part are put by one request in place of three, which then can be repeated.
    """

    def __init__(self, tries: int, options: dict[str, object]) -> None:
        self.tries, self.options = tries, options
        super().__init__(
            **options
            | {
                "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=tries),
                "connect_timeout": CONNECT_WITHIN_S,
                "request_timeout": ANSWER_WITHIN_S,
                "allow_delayed_open": True,
            }
        )

    @classmethod
    def like(cls, other: pafs.S3FileSystem, tries: int) -> "S3":
        """Of the same endpoint, region and credentials."""
        (options,) = pafs.S3FileSystem.__reduce__(other)[1]
        return cls(tries, options)

    def __reduce__(self) -> tuple[type["S3"], tuple[int, dict[str, object]]]:
        return type(self), (self.tries, self.options)
