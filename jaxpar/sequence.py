"""The order of tokens in which a causal mask gives each device of a `context` axis the same work."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxpar.integers import is_integer

CONTEXT_SIZE = "the size of mesh axis 'context'"


class ContextError(ValueError):
    """Arrays that don't fit or can't be split along the sequence: the message gives both numbers."""


def zigzag_order(length: int, size: int) -> np.ndarray:
    """Returns the order of tokens in which a causal mask gives each device of a `context` axis the same work.

    Of 2 x size equal parts, by which the length must divide, device i gets part i and the one as far from the end.
    `np.argsort` of the order is the way back.

    >>> zigzag_order(8, 2)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    if not is_integer(length):
        raise ContextError(f"length is {length!r}; give how many tokens a sequence has, as x.shape[1].")
    if not is_integer(size):
        raise ContextError(f"size is {size!r}; give the size of the mesh axis 'context', as mesh.shape['context'].")
    if size > 1:
        check_divides(f"The sequence has {length} tokens", length, 2 * size, f"twice {size}, {CONTEXT_SIZE}")
    parts = np.array_split(np.arange(length), 2 * size)
    return np.concatenate([part for i in range(size) for part in (parts[i], parts[-1 - i])])


def zigzag(batch: Mapping[str, Any], size: int, *, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the batch with its tokens in `zigzag_order`, and a leaf `positions`, B T, that tells where each one was.

    Give the positions to the attention and to a rotary embedding; then nothing depends on the order but the labels,
    which are moved too: shift them before. `keys` names the entries, NumPy or JAX arrays or nests of them, whose dim 1
    is the sequence; by default all, but for leaves of one dim. `size` is that of the mesh axis `context`.

    Raises:
      ContextError: lengths that differ or don't divide by 2 x size, an unknown key, no sequence.

    >>> zigzag({"x": np.arange(8)[None]}, 2)
    {'x': array([[0, 1, 6, 7, 2, 3, 4, 5]]), 'positions': array([[0, 1, 6, 7, 2, 3, 4, 5]], dtype=int32)}
    """
    is_list = keys is None or (isinstance(keys, Sequence) and not isinstance(keys, str))
    if not isinstance(batch, Mapping) or not is_list or any(key not in list(batch) for key in keys or ()):
        given = f"has {list(batch)}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
        raise ContextError(f"The batch {given}, keys= is {keys!r}; give a dict, and a list of names that it has.")
    chosen = {key: batch[key] for key in (batch if keys is None else keys) if key != "positions"}
    leaves = jax.tree_util.tree_leaves_with_path(chosen)
    shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves if np.ndim(leaf) > 1}
    if len({shape[:2] for shape in shapes.values()}) != 1:
        raise ContextError(f"The batch has sequences of shapes {shapes}; name those of one length, as keys=['x', 'y'].")
    rows, length = next(iter(shapes.values()))[:2]
    positions, order = batch.get("positions", np.arange(length, dtype="int32")), zigzag_order(length, size)
    dtype = getattr(positions, "dtype", type(positions).__name__)
    is_whole = hasattr(positions, "dtype") and np.issubdtype(dtype, np.integer)
    if not is_whole or np.shape(positions) not in ((length,), (rows, length)):
        raise ContextError(
            f"positions is {dtype} of shape {np.shape(positions)}; give an array of whole numbers, as int32, "
            f"{(length,)} or {(rows, length)}."
        )
    # Those that are given keep their dtype: a narrower one could wrap them.
    positions = positions[..., order] + np.zeros((rows, 1), dtype)
    moved = jax.tree.map(lambda leaf: leaf[:, order] if np.ndim(leaf) > 1 else leaf, chosen)
    return {**batch, **moved, "positions": positions}


def check_divides(given: str, count: int, parts: int, source: str, advice: str = "") -> None:
    """Raises ContextError, with the nearest numbers that do, unless `parts` divides `count`."""
    if count % parts:
        down = count - count % parts
        advice = advice or f"pad to {down + parts}{f', or use {down}' if down else ''}"
        raise ContextError(f"{given}, which do not divide by {parts}, {source}; {advice}.")
