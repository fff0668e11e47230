"""Programs compiled for targets, kept on disk in a folder that is the user's alone; changes with where and how.

`JAXPAR_CACHE_DIR` names another folder, or is empty for none. What is kept is text and sizes; nothing of it is run.
"""

import contextlib
import gzip
import hashlib
import json
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterable
from typing import Any

from jaxpar.stacklevel import warn_caller

_MOST = 256


def key_of(parts: Iterable[bytes | str]) -> str:
    """Returns a name for what the parts say together.

    >>> key_of(["a", b"b"]) == key_of(["a", "b"]) != key_of(["ab"])
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read(key: str) -> dict[str, Any] | None:
    """Returns what was kept under a key; None if nothing was, or it is damaged."""
    folder = _folder()
    if folder is None:
        return None
    path = folder / f"{key}.json.gz"
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    with contextlib.suppress(OSError):
        # What is read is not the oldest.
        os.utime(path)
    return found if isinstance(found, dict) else None


def write(key: str, content: dict[str, Any]) -> None:
    """Keeps plain data under a key, whole or not at all, and drops the oldest beyond 256."""
    folder = _folder()
    if folder is None:
        return
    part = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            part = pathlib.Path(file.name)
            file.write(gzip.compress(json.dumps(content).encode(), 6))
        os.replace(part, folder / f"{key}.json.gz")
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        warn_caller(
            f"A compiled program can't be kept in {folder}: {error.strerror}; name another folder by JAXPAR_CACHE_DIR."
        )
        return
    # Another process may drop some too.
    with contextlib.suppress(OSError):
        kept = sorted(folder.glob("*.json.gz"), key=lambda path: path.stat().st_mtime)
        for path in kept[: max(len(kept) - _MOST, 0)]:
            path.unlink(missing_ok=True)


def _folder() -> pathlib.Path | None:
    named = os.environ.get("JAXPAR_CACHE_DIR")
    if named == "":
        return None
    try:
        home = os.environ.get("XDG_CACHE_HOME")
        folder = pathlib.Path(named or (f"{home}/jaxpar" if home else "~/.cache/jaxpar")).expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        # A user without a home has nothing kept, unless a folder is named.
        if named:
            warn_caller(
                f"{named} is no folder that can be made: compiled programs are not kept; name another by "
                "JAXPAR_CACHE_DIR, or leave it empty to keep none."
            )
        return None
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        warn_caller(
            f"{folder} is another user's or can be written by others, so compiled programs are not kept there: chmod "
            "700 your own, or name another by JAXPAR_CACHE_DIR."
        )
        return None
    return folder
