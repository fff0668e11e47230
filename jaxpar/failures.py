"""Why a checkpoint can't be written or read, told once and in a line: errors of the system and of Orbax as ours."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator

from jaxpar.manifest import ManifestError, shown
from jaxpar.saved_leaves import CheckpointError

_ROOM = "make room, or keep fewer"
_OTHER = "give a folder that this process may write"
_NEXT_STEP = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit of a file's size, as by ulimit -f",
    errno.EROFS: _OTHER,
    errno.EACCES: _OTHER,
    errno.EPERM: _OTHER,
    errno.ENOENT: "is its disk still there?",
    errno.ESTALE: "is its disk still there?",
    errno.EEXIST: "a file is there already: give a folder's path",
    errno.ENOTDIR: "a file stands where a folder is needed: give another path",
    errno.EIO: "is its disk sound?",
}


def tell_cause(error: Exception) -> str:
    """Returns an error's cause in a sentence, with what to do about it where the system names it.

    >>> tell_cause(ValueError("Failed to write 4 bytes to file 17: No space left on device [os_error_code='28']"))
    'No space left on device; make room, or keep fewer.'
    """
    told = _tell(error)
    return told if told.endswith((".", "?")) else f"{told}."


def _tell(error: Exception) -> str:
    if isinstance(error, ManifestError | CheckpointError):
        return str(error)
    # TensorStore tells the system's number in its text.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number is None:
        return shown(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
    return "; ".join([os.strerror(number), *([_NEXT_STEP[number]] if number in _NEXT_STEP else [])])


@contextlib.contextmanager
def explained(what: str, then: str = "") -> Iterator[None]:
    """Raises errors of the system and of Orbax as CheckpointError, which says what couldn't be done, why, and then."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {tell_cause(error)}{then}") from error


def hush_orbax() -> None:
    """Keeps Orbax from logging a failed save with its stack, three times: jaxpar tells it."""
    logger = logging.getLogger("absl")
    if _is_told_elsewhere not in logger.filters:
        logger.addFilter(_is_told_elsewhere)


def _is_told_elsewhere(record: logging.LogRecord) -> bool:
    """Whether to log a record, as logging asks its filters."""
    return "_SignalingThread.run() raised an exception" not in str(record.msg)
