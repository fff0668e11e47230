"""Batches: any pytree of arrays, its rows counted, checked and padded; changes with what users feed."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.integers import is_integer

EXAMPLE_WEIGHT = "example_weight"


class BatchError(ValueError):
    """A batch that can't be used: the message gives the leaf, what it holds and what is needed."""


def read_batch(batch: Any) -> Any:
    """Returns the batch with each leaf as a NumPy or JAX array; torch tensors and lists of numbers are leaves too.

    Raises:
      BatchError: a leaf is text, ragged or no array, an int64 doesn't fit int32, or there is no leaf.

    >>> jax.tree.map(np.shape, read_batch({"x": [[1, 2], [3, 4]], "y": np.ones(2)}))
    {'x': (2, 2), 'y': (2,)}
    """
    if isinstance(batch, Iterator):
        raise BatchError(f"The batch is a {type(batch).__name__}, an iterator; give one batch of it, as next(batches).")
    try:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(batch, is_leaf=_is_number_list)
    except ValueError as error:
        raise BatchError(
            f"The batch can't be read as a pytree: {error}. Give a dict whose keys are all names."
        ) from None
    if not leaves:
        raise BatchError(f"The batch {batch!r} has no leaf; give a dict of arrays, as {{'x': x, 'y': y}}.")
    return jax.tree.unflatten(treedef, [_read_leaf(leaf, name_leaf(path)) for path, leaf in leaves])


def count_rows(batch: Any, is_shared: Callable[[str], bool] = lambda path: False) -> int:
    """Returns how many examples a batch holds: the first dim that its leaves have in common.

    Scalars are not counted, nor those leaves that the batch rules keep whole.

    Raises:
      BatchError: two leaves disagree, there are none to count, or no example is there.

    >>> count_rows({"x": np.ones((30, 4)), "y": np.ones(30), "temperature": np.ones(())})
    30
    """
    counted = [
        (name_leaf(path), np.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if np.ndim(leaf) and not is_shared(match_path(path))
    ]
    if not counted:
        raise BatchError(
            f"The batch has no leaf with a dim of examples: each of its {len(jax.tree.leaves(batch))} is a scalar, or "
            "kept whole; give at least one array with the examples in dim 0."
        )
    first, shape = counted[0]
    for name, other in counted[1:]:
        if other[0] != shape[0]:
            raise BatchError(
                f"Batch leaf {name} has {other[0]} examples, but {first} has {shape[0]}; all need the same first "
                "dim, or, for one without rows, sharded(..., batch_rules=[(regex, jaxpar.WHOLE)]) and pad_batch(..., "
                "whole=[regex])."
            )
    if not shape[0]:
        raise BatchError(
            f"Batch leaf {first} has the shape {shape}: 0 examples; at least 1 is needed: leave such a batch out."
        )
    return shape[0]


def pad_batch(batch: Mapping[str, Any], multiple: int, *, whole: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the batch with rows added up to the next multiple, and a float32 leaf `example_weight`, 0 for them.

    Train and eval steps multiply the weights in, and loss functions don't see them, so that padding counts for nothing.
    The rows added repeat the last one: they hold valid data, so that no NaN arises in them.

    Args:
      batch: a mapping of arrays, with the examples in dim 0; scalars stay as they are. If it has an `example_weight`
        already, that is padded with 0.
      multiple: what the rows must divide by: `strategy.num_shards`, times the microbatches.
      whole: regexes of the leaves without rows, those that batch rules call `jaxpar.WHOLE`.

    Raises:
      BatchError: the batch is not a mapping, or its leaves have different numbers of rows.

    >>> pad_batch({"x": np.arange(3)}, 4)["example_weight"]
    array([1., 1., 1., 0.], dtype=float32)
    """
    if not is_integer(multiple):
        raise BatchError(f"multiple is {multiple!r}; give a whole number, 1 or more, as strategy.num_shards.")
    if isinstance(whole, str) or not all(isinstance(pattern, str) for pattern in whole):
        raise BatchError(f"whole= is {whole!r}; give a list of regexes, as ['table'].")
    for pattern in whole:
        try:
            re.compile(pattern)
        except re.error as error:
            raise BatchError(f"whole= has {pattern!r}, which is no regex: {error}; as one, '*t' is '.*t'.") from None
    is_shared = lambda path: any(re.search(pattern, path) for pattern in whole)
    rows = count_rows(read_batch(batch), is_shared)
    return pad_rows(batch, math.ceil(rows / multiple) * multiple, is_shared)


def pad_rows(
    batch: Mapping[str, Any], target: int, is_shared: Callable[[str], bool] = lambda path: False
) -> dict[str, Any]:
    """Returns the batch padded to `target` rows, as `pad_batch` does, but for the leaves that `is_shared` names."""
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"The batch is a {type(batch).__name__}; padding adds the leaf {EXAMPLE_WEIGHT!r}, so give a dict, as "
            "{'x': x, 'y': y}."
        )
    batch = read_batch(batch)
    rows = count_rows(batch, is_shared)

    def pad(path: tuple, leaf: Any) -> Any:
        if not np.ndim(leaf) or is_shared(match_path(path)):
            return leaf
        xp = jnp if isinstance(leaf, jax.Array) else np
        return xp.concatenate([leaf, xp.repeat(leaf[-1:], target - rows, axis=0)])

    check_weight(batch, rows)
    weight = np.asarray(batch.get(EXAMPLE_WEIGHT, np.ones(rows)), np.float32)
    padded = dict(jax.tree_util.tree_map_with_path(pad, dict(batch)))
    padded[EXAMPLE_WEIGHT] = np.concatenate([weight, np.zeros(target - rows, np.float32)])
    return padded


def check_weight(batch: Any, rows: int) -> None:
    """Raises BatchError unless `example_weight`, where the batch has it, is one number of 0 or more an example."""
    if not isinstance(batch, Mapping) or EXAMPLE_WEIGHT not in batch:
        return
    weight = batch[EXAMPLE_WEIGHT]
    if not hasattr(weight, "shape"):
        raise BatchError(f"Batch leaf [{EXAMPLE_WEIGHT!r}] is {weight!r}; give one weight an example: shape ({rows},).")
    if weight.shape != (rows,):
        raise BatchError(
            f"Batch leaf [{EXAMPLE_WEIGHT!r}] has shape {weight.shape}; give one weight an example: ({rows},)."
        )
    if not isinstance(weight, np.ndarray) and not getattr(weight, "is_fully_addressable", False):
        return
    least = np.asarray(weight).min(initial=0)
    if not least >= 0:
        raise BatchError(
            f"Batch leaf [{EXAMPLE_WEIGHT!r}] holds {least}; a weight is 0 or more: give 0 to leave an example out."
        )


def name_leaf(path: tuple) -> str:
    """Returns a batch leaf's path as an error shows it, as one would write it: `['x']`."""
    return jax.tree_util.keystr(path) or "(the batch itself)"


def match_path(path: tuple) -> str:
    """Returns a batch leaf's path as the batch rules see it: `inputs/tokens`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_number_list(node: Any) -> bool:
    while isinstance(node, list) and node:
        node = node[0]
    return isinstance(node, int | float | bool | np.number | str | bytes)


def _read_leaf(leaf: Any, name: str) -> Any:
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise BatchError(
            f"Batch leaf {name} was deleted: a step that it was given to as state took over its memory; give a copy to "
            "one of the two, as x.copy()."
        )
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    try:
        array = np.asarray(leaf)
    except Exception as error:  # whatever the object's own __array__ raises
        if isinstance(leaf, list):
            raise BatchError(
                f"Batch leaf {name} is ragged: its {len(leaf)} rows have different lengths; pad them to one "
                "length, with a mask or weights for what was added."
            ) from None
        raise BatchError(f"Batch leaf {name} is a {type(leaf).__name__}, which NumPy can't view: {error}") from None
    if array.dtype == object:
        raise BatchError(
            f"Batch leaf {name} is a {type(leaf).__name__} that NumPy sees as objects, ragged or not numbers; "
            "give an array of numbers."
        )
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise BatchError(
            f"Batch leaf {name} has dtype {array.dtype}, which no device holds; turn text into numbers (tokens) "
            "or leave the leaf out."
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow != array.dtype and array.dtype.kind in "iu" and array.size:
        low, high, limits = array.min(), array.max(), np.iinfo(narrow)
        if low < limits.min or high > limits.max:
            raise BatchError(
                f"Batch leaf {name} holds {array.dtype} values from {low} to {high}, but JAX keeps {narrow} "
                f"({limits.min} to {limits.max}) unless jax_enable_x64 is set; set it, or make them smaller."
            )
    with np.errstate(over="ignore"):
        narrowed = array.astype(narrow, copy=False)
    if narrow != array.dtype and array.dtype.kind in "fc" and np.isinf(narrowed).sum() > np.isinf(array).sum():
        raise BatchError(
            f"Batch leaf {name} holds {array.dtype} values up to {np.abs(array).max()}, but JAX keeps {narrow} (up to "
            f"{np.finfo(narrow).max}) unless jax_enable_x64 is set; set it, or scale them."
        )
    return narrowed
