"""A state as a checkpoint holds it, its leaves and its step, and whether it holds those that are needed."""

import math
from typing import Any

import jax
import numpy as np

from jaxpar.integers import is_integer
from jaxpar.manifest import shown
from jaxpar.state import StateError, check_is_state, is_key, named_leaves

_KEY = "key"


class CheckpointError(ValueError):
    """A checkpoint that can't be written, or must not be restored: the message names it, and what to do."""


def dtype_of(leaf: Any) -> str:
    """Returns a leaf's dtype as text; a random key's tells its kind, as `key<fry>`."""
    return str(leaf.dtype)


def abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns what is to be loaded of a leaf: its numbers, where they belong."""
    if not is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)


def size_of(leaf: Any) -> int:
    """Returns the bytes of a leaf's numbers, all devices together."""
    numbers = abstract_leaf(leaf)
    return math.prod(numbers.shape) * numbers.dtype.itemsize


def as_key_like(words: jax.Array, like: Any) -> jax.Array:
    """Returns random keys of the kind of another leaf, made of their words."""
    impls = ("threefry2x32", "rbg", "unsafe_rbg")
    impl = next((name for name in impls if jax.random.key(0, impl=name).dtype == like.dtype), None)
    return jax.random.wrap_key_data(words, impl=impl)


def check_leaves(saved: dict[str, Any], like: Any, name: str) -> None:
    """Raises CheckpointError unless the saved leaves are those that are needed, in shape and dtype."""
    needed = {path: [list(leaf.shape), dtype_of(leaf)] for path, leaf in leaves_of(like).items()}
    if missing := sorted(set(needed) - set(saved)):
        raise CheckpointError(
            f"{name} lacks {len(missing)} of {len(needed)} leaves: {shown(', '.join(missing[:4]))}; it has "
            f"{len(saved)}. Is it of another model or optimizer?"
        )
    if more := sorted(set(saved) - set(needed)):
        raise CheckpointError(
            f"{name} has {len(more)} leaves that the state lacks: {shown(', '.join(more[:4])[:300])}. Is it of another "
            "model or optimizer?"
        )
    for path, (shape, dtype) in needed.items():
        if saved[path] != [shape, dtype]:
            raise CheckpointError(
                f"{name} has {path!r} as {tuple(saved[path][0])} {saved[path][1]}, but the state needs {tuple(shape)} "
                f"{dtype}. Is it of another model or optimizer?"
            )


def check_stored(metadata: Any, leaves: dict[str, Any], step: int) -> None:
    """Raises CheckpointError unless Orbax's metadata tells the manifest's shapes and dtypes; nothing is made yet.

    Nor may a part be larger than its array: it would be unpacked whole.
    """
    for path, (shape, dtype) in leaves.items():
        if 0 in shape:
            continue
        found = metadata.get(path) if isinstance(metadata, dict) else None
        numbers = "uint32" if dtype.startswith(_KEY) else dtype
        stored = None if found is None else tuple(found.shape)
        # A key's own numbers follow its shape.
        is_shape = stored is not None and list(stored[: len(shape)] if dtype.startswith(_KEY) else stored) == shape
        if found is None or not is_shape or str(np.dtype(found.dtype)) != numbers:
            told = "nothing" if found is None else f"{stored} {np.dtype(found.dtype)}"
            raise CheckpointError(
                f"Checkpoint {step} stores {told} as {path!r}, but its manifest says {shape} {dtype}. "
                "Restore another one."
            )
        parts = tuple(getattr(found.storage_metadata, "chunk_shape", None) or ())
        if len(parts) > len(found.shape) or any(part > size for part, size in zip(parts, found.shape, strict=False)):
            raise CheckpointError(
                f"Checkpoint {step} stores {path!r} in parts of {parts}, but the whole of it is {stored}. "
                "Restore another one."
            )


def check_loaded(loaded: Any, numbers: dict[str, Any], name: str) -> Any:
    """Returns what was loaded; raises CheckpointError unless it has the shapes and dtypes that were asked for."""
    for path, asked in numbers.items():
        found = loaded.get(path) if isinstance(loaded, dict) else None
        if not isinstance(found, jax.Array) or (found.shape, found.dtype) != (asked.shape, asked.dtype):
            told = f"{found.shape} {found.dtype}" if isinstance(found, jax.Array) else f"a {type(found).__name__}"
            needed = f"{asked.shape} {asked.dtype}"
            raise CheckpointError(
                f"{name} gave {told} for {path!r}, but the state needs {needed}. Restore another one."
            )
    return loaded


def check_step(step: Any) -> int:
    """Returns the number under which a checkpoint lies, of a state's own `step` too.

    Raises:
      CheckpointError: it is none.

    >>> check_step(np.array(120))
    120
    """
    number = step.item() if getattr(step, "shape", None) == () and hasattr(step, "item") else step
    if not is_integer(number, least=0) or int(number) >= 2**31:
        raise CheckpointError(f"step is {number!r}; give a whole number, 0 or more and less than {2**31}.")
    return int(number)


def leaves_of(state: Any) -> dict[str, Any]:
    """Returns each leaf by its path; raises CheckpointError where one is no array of a mesh, or two have one path."""
    try:
        check_is_state(state)
    except StateError as error:
        raise CheckpointError(str(error)) from error
    named: dict[str, Any] = {}
    for path, leaf in named_leaves(state):
        if path in named:
            raise CheckpointError(f"Two leaves of the state have the path {path!r}; give one of them another name.")
        if getattr(leaf, "sharding", None) is None:
            raise CheckpointError(
                f"State leaf {path!r} is a {type(leaf).__name__}, of no devices; give a state that strategy.init or "
                "strategy.place returned, or strategy.abstract_state(init_fn)."
            )
        named[path] = leaf
    return named
