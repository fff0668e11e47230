"""Text for a byte model: read in a fixed order, split in a fixed way, cut into batches by the seed alone."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

HELD_OUT = 10
MAX_BYTES = 2**30
_NOTHING = np.empty(0, np.uint8)
_INSTALLED, _TESTS = {"site-packages", "dist-packages", "__pycache__"}, {"test", "tests", "idle_test"}


class TextError(ValueError):
    """Text that can't be read or is too short: the message gives the path, what it holds and what is needed."""


class Text(NamedTuple):
    """What there is to read.

    Attributes:
      name: where it comes from, as a message begins.
      num_files: how many files it was read from.
      train: the bytes to train on.
      held_out: the bytes that training never sees.
    """

    name: str
    num_files: int
    train: np.ndarray
    held_out: np.ndarray


def read_text(path: str | Path | None = None, *, min_bytes: int = 1) -> Text:
    """Returns the bytes of a file, of all text files of a folder, or of the source of Python's own standard library.

    Files come in the order of their paths, whatever the file system's. Every tenth one is held out; where there are
    fewer than ten, the last tenth of the whole. Hidden files are left out, as are those that hold a zero byte.

    Args:
      path: the file or folder; None for the standard library, its tests left out: not every Python has them.
      min_bytes: the fewest bytes that either part may have.

    Raises:
      TextError: there is no such path, a file can't be read, or the text is too short or too long.

    >>> text = read_text()
    >>> text.name, len(text.train) > 1_000_000
    ("Python's own standard library", True)
    """
    name = "Python's own standard library" if path is None else f"Text {str(path)!r}"
    parts = _read_files(name, _library_files() if path is None else _files_of(Path(path), name))
    pieces = parts if len(parts) >= HELD_OUT else np.array_split(np.concatenate([*parts, _NOTHING]), HELD_OUT)
    held_out = pieces[HELD_OUT - 1 :: HELD_OUT]
    train = [piece for index, piece in enumerate(pieces) if index % HELD_OUT != HELD_OUT - 1]
    text = Text(name, len(parts), np.concatenate(train), np.concatenate(held_out))
    if min(len(text.train), len(text.held_out)) < min_bytes:
        raise TextError(
            f"{name} gives {len(text.train):,} bytes to train on and {len(text.held_out):,} held out, from "
            f"{len(parts):,} text file{'s' * (len(parts) != 1)}, but each part needs at least {min_bytes:,}; "
            "give more text."
        )
    return text


def draw_batches(
    data: np.ndarray, *, batch_size: int, seq_len: int, seed: int, steps: int, first: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches `first` to `steps` of windows drawn by the seed alone: `x`, and as `y` the byte after each of `x`.

    >>> batch = next(draw_batches(np.arange(100, dtype=np.uint8), batch_size=2, seq_len=3, seed=0, steps=1))
    >>> batch["x"].shape, bool((batch["y"] == batch["x"] + 1).all())
    ((2, 3), True)
    """
    for step in range(first, steps):
        starts = np.random.default_rng([seed, step]).integers(0, len(data) - seq_len, batch_size)
        yield _windows(data, starts, seq_len)


def even_batches(
    data: np.ndarray, *, batch_size: int, seq_len: int, max_windows: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of windows that don't overlap, at most `max_windows` of them, evenly over the data.

    The last batch may be short.

    >>> [batch["x"].tolist() for batch in even_batches(np.arange(9), batch_size=2, seq_len=2, max_windows=3)]
    [[[0, 1], [2, 3]], [[6, 7]]]
    """
    count = (len(data) - 1) // seq_len
    starts = np.linspace(0, count - 1, min(count, max_windows)).astype(int) * seq_len
    for first in range(0, len(starts), batch_size):
        yield _windows(data, starts[first : first + batch_size], seq_len)


def _windows(data: np.ndarray, starts: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    windows = data[starts[:, None] + np.arange(seq_len + 1)]
    return {"x": windows[:, :-1], "y": windows[:, 1:]}


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = _INSTALLED | _TESTS
    return [file for file in _sorted_files(root, "*.py") if left_out.isdisjoint(file.relative_to(root).parts)]


def _files_of(path: Path, name: str) -> list[Path]:
    if not path.exists():
        raise TextError(f"{name} does not exist; give a file or a folder.")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TextError(f"{name} is neither a file nor a folder; give one of them.")
    is_hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)
    return [file for file in _sorted_files(path, "*") if not is_hidden(file)]


def _sorted_files(root: Path, pattern: str) -> list[Path]:
    return sorted(
        (file for file in root.rglob(pattern) if file.is_file()), key=lambda file: file.relative_to(root).parts
    )


def _read_files(name: str, files: list[Path]) -> list[np.ndarray]:
    """The bytes of each file that is text and not empty."""
    try:
        size = sum(file.stat().st_size for file in files)
        if size > MAX_BYTES:
            raise TextError(f"{name} has {size:,} bytes, but at most {MAX_BYTES:,} are read; give a part of it.")
        parts = [file.read_bytes() for file in files]
    except OSError as error:
        raise TextError(
            f"Text {str(error.filename)!r} can't be read: {error.strerror}; give a file or folder of text."
        ) from error
    return [np.frombuffer(part, np.uint8) for part in parts if part and b"\0" not in part]
