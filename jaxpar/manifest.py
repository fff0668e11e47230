"""What a folder holds, written down beside it with a digest of each file; and whether it still does."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any

NAME = "jaxpar-manifest.json"
_FORMAT = 1


class ManifestError(ValueError):
    """A folder that isn't as its manifest says, or has none: the message names the file."""


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
    part = folder / f"{NAME}.part"
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / NAME)


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
    told, found = read["files"], dict(_files_of(folder))
    for name in sorted(set(told) ^ set(found)):
        raise ManifestError(f"{folder / name} is {'missing' if name in told else 'not of the checkpoint'}")
    for name, path in found.items():
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ManifestError(f"{path} can't be read: {error.strerror}") from error
        if size != told[name][0]:
            raise ManifestError(f"{path} has {size} bytes, but had {told[name][0]} when it was saved")
    for name, path, digest in _digest(folder):
        if digest != told[name][1]:
            raise ManifestError(f"{path} has changed since it was saved: its SHA-256 digest is another")
    return read["content"]


def _read(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        read = json.loads(path.read_text())
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no {NAME}: its save was not finished") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} can't be read: {error}") from error
    is_file = lambda entry: isinstance(entry, list) and [type(part) for part in entry] == [int, str]
    files = read.get("files") if isinstance(read, dict) else None
    if (
        not isinstance(files, dict)
        or not all(map(is_file, files.values()))
        or not isinstance(read.get("content"), dict)
    ):
        raise ManifestError(f"{path} is damaged: it doesn't list files and their digests")
    if read.get("format") != _FORMAT:
        raise ManifestError(f"{path} has format {read.get('format')!r}; this jaxpar reads {_FORMAT}")
    if read.pop("digest", None) != _digest_of(read):
        raise ManifestError(f"{path} has changed since it was written: its own digest is another")
    return read


def _digest_of(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _files_of(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    named = ((path.relative_to(folder).as_posix(), path) for path in paths)
    return [(name, path) for name, path in named if name not in (NAME, f"{NAME}.part")]


def _digest(folder: pathlib.Path) -> list[tuple[str, pathlib.Path, str]]:
    def digest(path: pathlib.Path) -> str:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ManifestError(f"{path} can't be read: {error.strerror}") from error

    files = _files_of(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = pool.map(digest, (path for _, path in files))
        return [(name, path, found) for (name, path), found in zip(files, digests, strict=True)]
