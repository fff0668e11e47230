"""The files of a checkpoint, before Orbax reads them: plain, no larger than what is needed, and of those leaves alone.

Digests tell damage, not intent: whoever can write into the folder can write digests that fit. What is checked here
keeps such a checkpoint from reading or writing elsewhere, and from filling the memory.
"""

import contextlib
import math
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp

from jaxpar.integers import is_integer
from jaxpar.manifest import NAME, ManifestError, list_files, read_json, read_manifest, shown
from jaxpar.saved_leaves import CheckpointError

# How names end beside the checkpoints: of one that is to take another's place, once it is whole; of one whose place a
# newer one takes, for as long as two renames last; of a file named by the step that a process could not write.
NEW, BEFORE, FAILED = ".jaxpar-new", ".jaxpar-before", ".jaxpar-failed"
# Of Orbax's own JSON, which lists each leaf, its parts and the devices that wrote it: for all, and for each leaf.
_BYTES, _BYTES_OF_LEAF = 2**20, 2**18
# What Orbax writes of each leaf. Its array data lies in folders of this name, packed.
_LEAVES, _DATA = "_METADATA", "d"


def step_of(name: str) -> int | None:
    """Returns the step whose checkpoint has a folder of this name, as `save` gives it; None for any other name.

    >>> step_of("120"), step_of("007"), step_of("-1"), step_of("1e3")
    (120, None, None, None)
    """
    is_step = name.isascii() and name.isdecimal() and len(name) <= 10 and name == str(int(name)) and int(name) < 2**31
    return int(name) if is_step else None


def read_content(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a checkpoint's manifest tells: its step, data, leaves, devices and processes.

    Raises:
      CheckpointError: it can't be read, or tells something else.
    """
    try:
        content = read_manifest(folder)
    except ManifestError as error:
        raise CheckpointError(f"{error}; {error.remedy}.") from error
    path = shown(folder / NAME)
    leaves = content.get("leaves")
    if not isinstance(leaves, dict) or not all(map(_is_leaf, leaves.values())):
        raise CheckpointError(
            f"The manifest {path} lists no leaves, each with its shape and dtype; {ManifestError.remedy}."
        )
    for name, least in (("step", 0), ("devices", 1), ("processes", 1)):
        number = content.get(name)
        if not is_integer(number, least) or number >= 2**31:
            told = shown(repr(number)[:50])
            raise CheckpointError(
                f"The manifest {path} tells {told} as {name}; a whole number from {least} is needed; "
                f"{ManifestError.remedy}."
            )
    return {"data": None, **content}


def check_files(folder: pathlib.Path, leaves: dict[str, Any], size: int) -> None:
    """Raises CheckpointError unless Orbax can read a folder without harm.

    Args:
      folder: of the checkpoint.
      leaves: those that are needed.
      size: bytes of the state that is needed.
    """
    most = _BYTES + _BYTES_OF_LEAF * len(leaves)
    try:
        for path, found in list_files(folder):
            allowed = most + (size if path.parent.name == _DATA else 0)
            if path.name != NAME and found > allowed:
                raise ManifestError(
                    f"{shown(path)} has {found} bytes, but {allowed} at most are read for a state of {size} bytes"
                )
            if path.name == _LEAVES:
                _check_names(path, leaves, most)
    except ManifestError as error:
        raise CheckpointError(f"{error}; {error.remedy}.") from error


def remove(path: pathlib.Path) -> None:
    """Removes a folder with all that it holds, or a link but not what it leads to; what can't be removed stays."""
    # A folder too deep for Python's own recursion is nothing that a save has left.
    with contextlib.suppress(OSError, RecursionError):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def replace(old: pathlib.Path, new: pathlib.Path) -> None:
    """Puts a finished checkpoint in an older one's place, which is whole until then."""
    before = old.with_name(f"{old.name}{BEFORE}")
    old.rename(before)
    new.rename(old)
    remove(before)


def put_back(directory: pathlib.Path) -> None:
    """Gives the older ones back the names that `replace` took from them, if it was killed before it gave them on."""
    for before in directory.glob(f"*{BEFORE}"):
        name = before.name.removesuffix(BEFORE)
        # Where the folder can only be read, or another process was quicker, it stays as it is.
        with contextlib.suppress(OSError):
            if step_of(name) is not None and not (directory / name).exists():
                before.rename(directory / name)


def _check_names(path: pathlib.Path, leaves: dict[str, Any], most: int) -> None:
    """Raises ManifestError unless Orbax's list holds the leaves that are needed, by their names, packed into one store.

    Otherwise each name would be the path of a folder.
    """
    read = read_json(path, most)
    told = read.get("tree_metadata") if isinstance(read, dict) else None
    if not isinstance(told, dict) or read.get("use_ocdbt") is not True:
        raise ManifestError(f"{shown(path)} is damaged: it lists no leaves that are packed into one store")
    for entry in told.values():
        keys = entry.get("key_metadata") if isinstance(entry, dict) else None
        is_key = isinstance(keys, list) and len(keys) == 1 and isinstance(keys[0], dict)
        key = keys[0].get("key") if is_key and keys else None
        if not isinstance(key, str) or key not in leaves:
            raise ManifestError(f"{shown(path)} lists {shown(repr(key)[:200])}, which is no leaf of this checkpoint")


def _is_leaf(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list):
        return False
    shape, dtype = entry
    if len(shape) > 64 or any(not is_integer(dim, least=0) for dim in shape):
        return False
    return math.prod(max(dim, 1) for dim in shape) < 2**60 and width_of(dtype) > 0


def width_of(dtype: Any) -> int:
    """Returns the bytes of one number of a dtype, as the manifest tells it; 0 if it is none.

    >>> width_of("bfloat16"), width_of("key<fry>"), width_of("text")
    (2, 8, 0)
    """
    if not isinstance(dtype, str):
        return 0
    if dtype.startswith("key<"):
        # Two words of threefry, the default.
        return 8
    try:
        return jnp.dtype(dtype).itemsize
    except (TypeError, ValueError, SyntaxError, OverflowError):
        return 0
