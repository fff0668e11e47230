"""What a folder holds, written down beside it with a digest of each file; and whether it still does.

What is read may have been made to do harm: nothing outside the folder is opened, and nothing large is taken in.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

NAME = "jaxpar-manifest.json"
_FORMAT = 1
# Of 200,000 files; what is read of JSON takes up to twenty times as much memory.
_MOST_BYTES = 2**25
_MOST_FOLDERS = 16


class ManifestError(ValueError):
    """A folder that isn't as its manifest says, or has none: the message names the file, `remedy` says what to do."""

    remedy = "copy it again from where it was whole, or delete its folder"


class MissingError(ManifestError):
    """There is no such folder."""

    remedy = "give a step that is there"


class NewerFormatError(ManifestError):
    """A manifest that a newer jaxpar wrote: all may be well with it."""

    remedy = "upgrade jaxpar"


def shown(name: object) -> str:
    r"""Returns a name as a message may hold it, whatever bytes or control characters are in it.

    >>> shown("state/d/1"), shown("bad\udcff\n")
    ('state/d/1', "'bad\\udcff\\n'")
    """
    return str(name) if str(name).isprintable() else ascii(str(name))


def list_files(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, int]]:
    """Yields each file of a folder, by name, and its bytes.

    Raises:
      ManifestError: one is a link, which may lead out of the folder, or a device or pipe, which may have no end.
    """
    if folder.is_symlink():
        raise ManifestError(f"{shown(folder)} is a link; put the folder itself there")

    def fail(error: OSError) -> None:
        raise ManifestError(f"{shown(error.filename)} can't be read: {error.strerror}") from error

    for where, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        if where.count(os.sep) - str(folder).count(os.sep) > _MOST_FOLDERS:
            raise ManifestError(
                f"{shown(where)} lies more than {_MOST_FOLDERS} folders deep, as nothing of Orbax's does"
            )
        for name in sorted([*folders, *names]):
            path = pathlib.Path(where, name)
            try:
                found = path.lstat()
            except OSError as error:
                raise ManifestError(f"{shown(path)} can't be read: {error.strerror}") from error
            if stat.S_ISREG(found.st_mode):
                yield path, found.st_size
            elif not stat.S_ISDIR(found.st_mode):
                what = "a link" if stat.S_ISLNK(found.st_mode) else "no plain file"
                raise ManifestError(f"{shown(path)} is {what}; a checkpoint holds plain files alone")


def read_json(path: pathlib.Path, most: int) -> Any:
    """Returns what a JSON file of at most so many bytes holds.

    Raises:
      FileNotFoundError: it isn't there.
      ManifestError: it can't be read, is no plain file, is too large or no JSON.
    """
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise ManifestError(f"{shown(path)} is no plain file")
        if found.st_size > most:
            raise ManifestError(f"{shown(path)} has {found.st_size} bytes, but {most} at most are read")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ManifestError(f"{shown(path)} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{shown(path)} can't be read: it is no JSON: {shown(error)}") from error


def write_manifest(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes plain data, and a SHA-256 digest of each file, into a folder: whole, and last.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     folder = pathlib.Path(name)
    ...     _ = (folder / "a").write_text("one")
    ...     write_manifest(folder, {"step": 3})
    ...     check_manifest(folder)
    {'step': 3}
    """
    files = {name: [path.stat().st_size, digest] for name, path, digest in _digest(folder)}
    told = {"format": _FORMAT, "files": files, "content": content}
    text = json.dumps({**told, "digest": _digest_of(told)}, indent=1)
    if len(text) > _MOST_BYTES:
        raise ManifestError(f"{shown(folder / NAME)} would have {len(text)} bytes, but {_MOST_BYTES} at most are read")
    part = folder / f"{NAME}.part"
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / NAME)


def has_manifest(folder: pathlib.Path) -> bool:
    """Returns whether a folder has a manifest, or what it has can't be seen: reading it says why."""
    try:
        return (folder / NAME).exists()
    except PermissionError:
        return True


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the plain data of a folder's manifest; the files are not looked at.

    Raises:
      ManifestError: there is none, or it is damaged.
    """
    return _read(folder)["content"]


def read_digest(folder: pathlib.Path) -> str:
    """Returns the digest of a folder's manifest, and so of all that it lists.

    Raises:
      ManifestError: there is none, or it is damaged.
    """
    return _digest_of(_read(folder))


def check_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the plain data of a folder's manifest, once every file has the size and digest that it tells.

    Raises:
      ManifestError: there is none, it is damaged, or a file is missing, new or changed.
    """
    read = _read(folder)
    told, found = read["files"], _files_of(folder)
    for name in sorted(set(told) ^ set(found)):
        what = "missing" if name in told else "not of the checkpoint"
        raise ManifestError(f"{shown(folder / name)} is {what}")
    for name, (path, size) in found.items():
        if size != told[name][0]:
            raise ManifestError(f"{shown(path)} has {size} bytes, but had {told[name][0]} when it was saved")
    for name, path, digest in _digest(folder):
        if digest != told[name][1]:
            raise ManifestError(f"{shown(path)} has changed since it was saved: its SHA-256 digest is another")
    return read["content"]


def _read(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / NAME
    if folder.is_symlink():
        raise ManifestError(f"{shown(folder)} is a link; put the folder itself there")
    try:
        read = read_json(path, _MOST_BYTES)
    except FileNotFoundError:
        if not folder.exists():
            raise MissingError(f"there is no {shown(folder)}") from None
        raise ManifestError(f"{shown(folder)} has no {NAME}: its save was not finished") from None
    form = read.get("format") if isinstance(read, dict) else None
    if type(form) is int and form > _FORMAT:
        # Whatever else it holds may be of another structure.
        raise NewerFormatError(
            f"{shown(path)} was written by a newer jaxpar, in format {str(form)[:20]}, and this one reads {_FORMAT}"
        )
    is_file = lambda entry: isinstance(entry, list) and [type(part) for part in entry] == [int, str]
    files = read.get("files") if isinstance(read, dict) else None
    if (
        not isinstance(files, dict)
        or not all(map(is_file, files.values()))
        or not isinstance(read.get("content"), dict)
    ):
        raise ManifestError(f"{shown(path)} is damaged: it doesn't list files and their digests")
    if form != _FORMAT:
        raise ManifestError(f"{shown(path)} has format {shown(repr(form)[:100])}; this jaxpar reads {_FORMAT}")
    try:
        digest = _digest_of({name: told for name, told in read.items() if name != "digest"})
    except RecursionError:
        raise ManifestError(f"{shown(path)} is damaged: it is nested too deeply") from None
    if read.pop("digest", None) != digest:
        raise ManifestError(f"{shown(path)} has changed since it was written: its own digest is another")
    return read


def _digest_of(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _files_of(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, int]]:
    named = {path.relative_to(folder).as_posix(): (path, size) for path, size in list_files(folder)}
    return {name: found for name, found in named.items() if name not in (NAME, f"{NAME}.part")}


def _digest(folder: pathlib.Path) -> list[tuple[str, pathlib.Path, str]]:
    def digest(path: pathlib.Path) -> str:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ManifestError(f"{shown(path)} can't be read: {error.strerror}") from error

    files = _files_of(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(digest, (path for path, _ in files.values()))
        return [(name, path, found) for (name, (path, _)), found in zip(files.items(), digests, strict=True)]
