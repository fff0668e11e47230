"""Batches in a shuffled order that any number of processes share, and that a run goes on with where it was."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpar.batch import EXAMPLE_WEIGHT
from jaxpar.integers import is_integer
from jaxpar.strategy import Strategy
from jaxpar.text import read_text

_THREADS, _AHEAD = 4, 8


class DataError(ValueError):
    """What can't be loaded: the message gives what it holds and what is needed."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """This process's part of each global batch: iterate over it, or call it with the batch to begin at.

    Attributes:
      source: the examples, by number.
      batch_size: rows of a global batch.
      seed: of the order.
      epochs: how often each example comes; None for without end.
      part: which of the parts this process loads, and how many there are.

    >>> len(Batches(list(range(10)), batch_size=4, seed=0, epochs=2, part=(0, 1)))
    5
    """

    source: Any
    batch_size: int
    seed: int
    epochs: int | None
    part: tuple[int, int]

    def __len__(self) -> int:
        """How many batches there are; raises TypeError where they don't end."""
        if self.epochs is None:
            raise TypeError("Batches without end have no length; give epochs=.")
        return math.ceil(len(self.source) * self.epochs / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self(0)

    def __call__(self, first: int) -> Iterator[dict[str, Any]]:
        """Returns the batches from one on, as `jaxpar.fit` asks for them when a run goes on."""
        if first < 0:
            raise DataError(f"The batch to begin at is {first}; give a whole number, 0 or more.")
        grain = _grain()
        order = grain.MapDataset.source(self.source).seed(self.seed).shuffle().repeat(self.epochs)
        index, parts = self.part
        local = self.batch_size // parts
        total = None if self.epochs is None else len(self.source) * self.epochs
        is_short = total is not None and total % self.batch_size > 0

        def example(number: int) -> Any:
            batch, row = divmod(number, local)
            place = batch * self.batch_size + index * local + row
            found = order[place if total is None else min(place, total - 1)]
            if not is_short:
                return found
            # All batches alike, or the last one would be compiled for.
            weight = found.get(EXAMPLE_WEIGHT, np.float32(1))
            return {**found, EXAMPLE_WEIGHT: np.float32(weight * (total is None or place < total))}

        last = np.iinfo(np.int64).max // 2 if total is None else math.ceil(total / self.batch_size) * local
        rows = grain.MapDataset.range(first * local, last - last % local).map(example).batch(local)
        return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)))


def load(source: Any, strategy: Strategy, *, batch_size: int, seed: int = 0, epochs: int | None = None) -> Batches:
    """Returns batches in an order that the seed alone decides, each process's own part of them, read ahead by grain.

    The order is the same for any number of processes. Every epoch has another one. A last short batch is filled up with
    rows that count for nothing, by an `example_weight` of 0. Give them to `jaxpar.fit`, which goes on where it was:
    every batch is found by its number. For a loader of your own, `strategy.data_shard()` tells which part to load.

    Args:
      source: a dict of arrays with the same number of rows, a `TextWindows`, or whatever has a length and gives an
        example, a dict of arrays, by its number: a list, any source of grain's.
      strategy: tells the part of a batch that this process loads.
      batch_size: rows of a global batch, over all processes.
      seed: of the order.
      epochs: how often each example comes; None for without end.

    Raises:
      DataError: there is no example, rows differ, or a number can't be.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> batches = load({"x": np.arange(20)}, strategy, batch_size=8, epochs=1)
    >>> examples = [int(x) for batch in batches for x in batch["x"][batch["example_weight"] > 0]]
    >>> len(batches), sorted(examples) == list(range(20))
    (3, True)
    """
    for name, number in (("batch_size", batch_size), ("epochs", epochs)):
        if number is None and name == "epochs":
            continue
        if not is_integer(number):
            raise DataError(f"{name} is {number!r}; give a whole number, 1 or more.")
    if not is_integer(seed, least=0) or seed >= 2**32:
        raise DataError(f"seed is {seed!r}; give a whole number from 0 to {2**32 - 1}.")
    if not hasattr(strategy, "data_shard"):
        raise DataError(
            f"strategy is a {type(strategy).__name__}; give what jaxpar.sharded(mesh, ...) or jaxpar.data_parallel() "
            "returns."
        )
    index, parts = strategy.data_shard()
    unit = math.lcm(strategy.num_shards, parts)
    if batch_size % unit:
        raise DataError(
            f"batch_size is {batch_size}, which does not divide by {unit}, the shards and processes of "
            f"{strategy.name}; give {batch_size - batch_size % unit + unit}."
        )
    if isinstance(source, Mapping):
        source = _Rows({name: np.asarray(array) for name, array in source.items()})
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise DataError(f"source is a {type(source).__name__}; give what has a length and examples by their number.")
    if not len(source):
        raise DataError("source has no example; give one with at least as many as batch_size.")
    if not isinstance(source[0], Mapping):
        raise DataError(
            f"An example is a {type(source[0]).__name__}; give dicts of arrays, as {{'x': x, 'y': y}}; of a text file "
            "or folder, jaxpar.data.TextWindows(path, length=...)."
        )
    _grain()
    return Batches(source, int(batch_size), int(seed), epochs, (index, parts))


class TextWindows(Sequence):
    """Windows of a text's bytes that don't overlap, as `x`, and the byte after each as `y`.

    Args:
      path: a file, a folder of text files, or None for Python's own standard library.
      length: the bytes of a window.
      held_out: whether to take the tenth that training never sees.

    Raises:
      TextError: the text can't be read, or is too short.

    >>> windows = TextWindows(length=64)
    >>> bool((windows[0]["x"][1:] == windows[0]["y"][:-1]).all()), windows[0]["x"].shape
    (True, (64,))
    """

    def __init__(self, path: str | pathlib.Path | None = None, *, length: int, held_out: bool = False):
        text = read_text(path, min_bytes=length + 1)
        self._bytes, self._length = text.held_out if held_out else text.train, length

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._length

    def __getitem__(self, number: Any) -> Any:
        if not -len(self) <= number < len(self):
            raise IndexError(f"There are {len(self)} windows, from 0; {number} is none of them.")
        first = number % len(self) * self._length
        window = self._bytes[first : first + self._length + 1]
        return {"x": window[:-1], "y": window[1:]}


class _Rows:
    """Arrays as examples: a row of each."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        counts = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
        if len(set(counts.values())) != 1 or None in counts.values():
            raise DataError(f"source has arrays of {counts} rows; give arrays with the same number.")
        self._arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {name: array[number] for name, array in self._arrays.items()}


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise DataError("jaxpar.data needs grain: pip install 'jaxpar[data]'") from error
    return grain
