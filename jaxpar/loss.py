"""What a model's function returns, and how it adds up over examples, microbatches and shards."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxpar.batch import EXAMPLE_WEIGHT, BatchError, count_rows, match_path
from jaxpar.dependence import reads
from jaxpar.mesh import AXIS_NAME, ROW_AXIS
from jaxpar.state import StateError, Static, build_model, is_key, named_leaves, read_model_state

Values = Any
# Linen's own name for BatchNorm's running averages.
_STATISTICS = "batch_stats"


@struct.dataclass
class Weighted:
    """A loss or metric whose examples weigh unequally: over a step it is Σ total / Σ weight, never a mean of means.

    Attributes:
      total: the weighted sum, a scalar or one value an example.
      weight: the sum of the weights, of the same shape.

    >>> mask = jnp.array([1.0, 1.0, 0.0])
    >>> Weighted(total=(mask * jnp.array([2.0, 4.0, 9.0])).sum(), weight=mask.sum()).weight
    Array(2., dtype=float32)
    """

    total: Any
    weight: Any


def is_weighted(node: Any) -> bool:
    """Returns whether it is a `Weighted`: where `jax.tree` is to stop, as `is_leaf`.

    >>> jax.tree.leaves({"loss": Weighted(2.0, 1.0), "norm": 3.0}, is_leaf=is_weighted)
    [Weighted(total=2.0, weight=1.0), 3.0]
    """
    return isinstance(node, Weighted)


class LossError(TypeError):
    """A function that returns what can't be summed over examples: the message says what it gave and what is needed."""


def read_loss(result: Any) -> tuple[Any, Mapping[str, Any], Mapping[str, Any] | None]:
    """Returns `(loss, metrics, updates)` from what a loss function gave: all three, the first two, or a loss alone."""
    parts = result if isinstance(result, tuple) else (result, {})
    if len(parts) not in (2, 3):
        raise LossError(
            f"loss_fn returned {len(parts)} values; it gives (loss, metrics), or (loss, metrics, updates) where a "
            "linen model changes collections."
        )
    loss, metrics, updates = (*parts, None) if len(parts) == 2 else parts
    if not isinstance(metrics, Mapping):
        raise LossError(
            f"loss_fn returned metrics of type {type(metrics).__name__}; give a dict of names to values, {{}} for "
            "none, after the loss."
        )
    odd = [name for name in metrics if not isinstance(name, str)]
    if odd:
        raise LossError(
            f"loss_fn returned a metric named {odd[0]!r}, a {type(odd[0]).__name__}; a metric's name is a str."
        )
    total = loss.total if isinstance(loss, Weighted) else loss
    if isinstance(total, jax.Array) and not jnp.issubdtype(total.dtype, jnp.floating):
        raise LossError(
            f"loss_fn returned a loss of dtype {total.dtype}; give a floating-point one, of which to take a gradient."
        )
    if not isinstance(loss, Weighted | jax.Array | float):
        raise LossError(
            f"loss_fn returned a loss of type {type(loss).__name__}; give a scalar, one value an example, or "
            "jaxpar.Weighted(total, weight)."
        )
    return loss, metrics, updates


def call_model(
    fn: Callable[..., Any],
    static: Static,
    params: Any,
    model_state: Any,
    batch: Any,
    keys: tuple[Any, ...],
    *,
    evaluating: bool = False,
) -> tuple[Any, Any]:
    """Returns what `fn(model, batch, rng)` gives, and the model's non-trained state after it.

    Args:
      fn: the loss or evaluation function.
      static: the model's structure.
      params: all parameters.
      model_state: the non-trained state by collection.
      batch: the rows it sees; `example_weight` is held back, since whoever calls multiplies it in.
      keys: the state's key and then the numbers to fold into it, and into nnx's own keys.
      evaluating: an nnx model is put in eval mode; the state isn't read back.
    """
    rng, *numbers = keys
    folded = {
        name: jax.tree.map(lambda leaf: fold_leaf(leaf, numbers), leaves) if name in static.rng_collections else leaves
        for name, leaves in model_state.items()
    }
    model = build_model(static, params, folded)
    if evaluating and static.graphdef is not None:
        model.eval()
    if isinstance(batch, Mapping) and EXAMPLE_WEIGHT in batch:
        batch = _WithoutWeight((name, leaf) for name, leaf in batch.items() if name != EXAMPLE_WEIGHT)
    result = _call(fn, model, batch, fold(rng, numbers))
    if evaluating:
        return result, model_state
    if static.graphdef is not None:
        if isinstance(result, tuple) and len(result) == 3:
            raise LossError(
                "loss_fn returned updates for an nnx model, whose variables are read back by themselves; give "
                "(loss, metrics)."
            )
        return result, _like(read_model_state(static, model, model_state), model_state)
    _, metrics, updates = read_loss(result)
    if taken := sorted(name for name in set(metrics) & set(model_state) if isinstance(metrics[name], Mapping)):
        raise LossError(
            f"loss_fn's second value, its metrics, has {taken}, collections of the state; what changes them comes "
            "third, as (loss, {}, updates)."
        )
    if updates is None:
        _check_statistics(lambda variables: fn(variables, batch, fold(rng, numbers)), model)
        updates = {}
    if not isinstance(updates, Mapping):
        raise LossError(
            f"loss_fn returned updates of type {type(updates).__name__}; give a dict of the changed collections."
        )
    unknown = sorted(set(updates) - set(model_state))
    if unknown:
        raise StateError(
            f"loss_fn returned updates for {unknown}, but the state holds the collections {sorted(model_state)}; "
            "return those alone, or give the others to TrainState.create."
        )
    return result, _like({**model_state, **updates}, model_state)


def sum_values(
    call: Callable[[Any, tuple], tuple[Values, Any]],
    batch: Any,
    model_state: Any,
    *,
    fraction: float,
    is_shared: Callable[[str], bool],
    keep_examples: bool = False,
) -> tuple[Values, Any]:
    """Returns each value that `call` gives as its part of a sum over the whole batch, and the model's state after it.

    Args:
      call: `call(batch, numbers)` gives a pytree of values and the state; the numbers are for its random keys.
      batch: the rows of one shard and microbatch.
      model_state: the state before it: with padding in the batch it must not change.
      fraction: what part of the whole batch these rows are.
      is_shared: tells from a batch leaf's path whether it has no rows.
      keep_examples: whether values of one an example are returned as they are, not summed.

    Returns:
      The pytree with a `Weighted` for each value. Where examples weigh alike, its total is a part of the mean and its
      weight None, so that no division is left to do; else both are sums, over the global number of rows.
    """
    rows = count_rows(batch, is_shared)
    weight = batch.get(EXAMPLE_WEIGHT) if isinstance(batch, Mapping) else None
    values, after = call(batch, ())
    if weight is not None:
        _check_unchanged(model_state, after)
        check_values(values, rows)
        if not all(_is_per_example(value, rows) for value in _leaves(values)):
            # A scalar has mixed real rows with padding already: take the rows one by one instead.
            values = _call_by_row(call, batch, rows, is_shared)
    check_values(values, rows)
    return jax.tree.map(
        lambda value: _sum_value(value, weight, rows, fraction, keep_examples), values, is_leaf=is_weighted
    ), after


def mean_value(value: Weighted) -> jax.Array:
    """Returns the mean that sums over a whole batch stand for; 0 where nothing weighs anything."""
    if value.weight is None:
        return value.total
    return jnp.where(value.weight == 0, 0, value.total / jnp.where(value.weight == 0, 1, value.weight))


def fold(key: jax.Array, numbers: Any) -> jax.Array:
    """Returns the key with each number folded in, in turn."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def grow(array: jax.Array) -> jax.Array:
    """Returns the array in float32, or wider if it was, as whole numbers are under x64: what sums are kept in."""
    least = jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.result_type(float)
    return array.astype(jnp.promote_types(array.dtype, least))


class _WithoutWeight(dict):
    """A batch whose example weights the step multiplies in: asking for them says so."""

    def __missing__(self, name: str) -> Any:
        if name == EXAMPLE_WEIGHT:
            raise BatchError(
                f"batch[{EXAMPLE_WEIGHT!r}] is multiplied in by the step itself; leave it out of the function, or "
                "call your own weights another name."
            )
        raise KeyError(name)


jax.tree_util.register_pytree_with_keys(
    _WithoutWeight,
    lambda d: ([(jax.tree_util.DictKey(name), d[name]) for name in sorted(d)], tuple(sorted(d))),
    lambda names, leaves: _WithoutWeight(zip(names, leaves, strict=True)),
)


def fold_leaf(leaf: jax.Array, numbers: Any) -> jax.Array:
    """Returns the leaf, with each number folded into it if it holds random keys."""
    if not is_key(leaf):
        return leaf
    # A scanned stack of layers holds a key a layer.
    return (
        jax.vmap(lambda key: fold(key, numbers))(leaf.ravel()).reshape(leaf.shape) if leaf.ndim else fold(leaf, numbers)
    )


def _call(fn: Callable[..., Any], model: Any, batch: Any, rng: jax.Array) -> Any:
    try:
        return fn(model, batch, rng)
    except NameError as error:
        named = re.search(r"unbound axis name: (\w+)", str(error))
        # That one is bound once a model turns out to need it; under pmap its engine tells of it.
        if named is None or named[1] == AXIS_NAME:
            raise
        raise LossError(
            f"The model reduces over the axis {named[1]!r}; a step binds the name {AXIS_NAME!r}, as for "
            f"BatchNorm(axis_name={AXIS_NAME!r}), or under pmap the one given, data_parallel(axis_name={named[1]!r})."
        ) from error


def _check_statistics(call: Callable[[Any], Any], variables: dict[str, Any]) -> None:
    """Raises LossError where BatchNorm's statistics are neither used nor given back: their updates were dropped."""
    statistics = variables.get(_STATISTICS)
    if statistics and not reads(lambda given: call({**variables, _STATISTICS: given}), statistics):
        raise LossError(
            f"loss_fn returned 2 values, but the state holds {_STATISTICS!r}, which the loss neither uses nor updates: "
            "BatchNorm's running averages would stay as they are. Give (loss, metrics, updates), as of y, updates = "
            f"module.apply(variables, x, mutable=[{_STATISTICS!r}]); or {{}} as updates to leave them."
        )


def _like(after: Any, before: Any) -> Any:
    """The state after a call, checked against the one before and in its dtypes: a step's carry never changes."""
    old, new = dict(named_leaves(before)), dict(named_leaves(after))
    if old.keys() != new.keys():
        raise StateError(
            f"The model's state changed its leaves, by {sorted(old.keys() ^ new.keys())}; a step keeps them. Give back "
            "each collection with the leaves that it came with, and what was gathered besides in the metrics."
        )
    for path, leaf in new.items():
        if leaf.shape != old[path].shape:
            raise StateError(
                f"'model_state/{path}' changed its shape from {old[path].shape} to {leaf.shape}; a step keeps it. Give "
                "it back as it came, and let a history that grows be a metric, or be kept outside the model."
            )
    return jax.tree.map(lambda a, b: a if a.dtype == b.dtype else a.astype(b.dtype), after, before)


def check_values(values: Values, rows: int) -> None:
    """Raises LossError, which names it, for a value that can't be summed over `rows` examples."""
    for path, value in jax.tree_util.tree_leaves_with_path(values, is_leaf=is_weighted):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the value"
        parts = (value.total, value.weight) if isinstance(value, Weighted) else (value,)
        if not all(isinstance(part, jax.Array | np.ndarray | np.generic | float | int) for part in parts):
            raise LossError(
                f"{name!r} is {value!r}; give a scalar, one value an example, or jaxpar.Weighted(total, weight)."
            )
        if any(is_key(part) for part in parts):
            raise LossError(f"{name!r} is a random key; give numbers.")
        shapes = [jnp.shape(part) for part in parts]
        if len(set(shapes)) > 1:
            raise LossError(
                f"{name!r} is Weighted with a total of shape {shapes[0]} and a weight of shape {shapes[1]}; both "
                "need the same."
            )
        # A loss alone: outputs, as logits, may well have as many classes as there are rows.
        if name == "loss" and len(parts) == 1 and shapes[0][:2] == (rows, rows) and rows > 1:
            raise LossError(
                f"{name!r} has shape {shapes[0]} for {rows} examples: each against every other, as ({rows}, 1) - "
                f"({rows},) broadcasts. Give one value an example; .mean(axis=1) if it is meant so."
            )
        if len(parts) == 1 and shapes[0] and shapes[0][0] != rows:
            raise LossError(
                f"{name!r} has shape {shapes[0]}, neither a scalar nor one value an example ({rows} here); reduce "
                "it, or give jaxpar.Weighted(total, weight)."
            )


def _check_unchanged(before: Any, after: Any) -> None:
    for (path, old), new in zip(named_leaves(before), jax.tree.leaves(after), strict=True):
        if old is not new:
            raise BatchError(
                f"'model_state/{path}' changes with a batch that is padded: its statistics would count the padding. "
                "Train such a model on whole batches (no example_weight), or use running averages."
            )


def _call_by_row(call: Callable, batch: Any, rows: int, is_shared: Callable[[str], bool]) -> Values:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    axes = [0 if leaf.ndim and not is_shared(match_path(path)) else None for path, leaf in leaves]

    def call_one(row: jax.Array, *arrays: jax.Array) -> Values:
        lone = [array[None] if axis == 0 else array for array, axis in zip(arrays, axes, strict=True)]
        values, _ = call(jax.tree.unflatten(treedef, lone), (row,))
        return jax.tree.map(_one_row, values, is_leaf=is_weighted)

    return jax.vmap(call_one, in_axes=(0, *axes), axis_name=ROW_AXIS)(jnp.arange(rows), *(leaf for _, leaf in leaves))


def _one_row(value: Any) -> Any:
    if isinstance(value, Weighted):
        return Weighted(jnp.sum(value.total), jnp.sum(value.weight))
    value = jnp.asarray(value)
    return value[0] if _is_per_example(value, 1) else value


def _sum_value(value: Any, weight: jax.Array | None, rows: int, fraction: float, keep_examples: bool) -> Any:
    if isinstance(value, Weighted):
        total, mass = jnp.asarray(value.total), jnp.asarray(value.weight)
        if weight is not None:
            total, mass = total * weight, mass * weight
        return Weighted(grow(total).sum() * (fraction / rows), grow(mass).sum() * (fraction / rows))
    value = jnp.asarray(value)
    per_example = _is_per_example(value, rows)
    if per_example and keep_examples:
        return value
    value = grow(value)
    if weight is None:
        mean = value.mean()
        return Weighted(mean if fraction == 1 else mean * fraction, None)
    value = value.reshape(rows, -1).mean(axis=1)
    return Weighted((value * weight).sum() * (fraction / rows), grow(weight).sum() * (fraction / rows))


def _leaves(values: Values) -> list[Any]:
    return jax.tree.leaves(values, is_leaf=is_weighted)


def _is_per_example(value: Any, rows: int) -> bool:
    if isinstance(value, Weighted):
        return jnp.shape(value.total) == jnp.shape(value.weight) == (rows,)
    return jnp.ndim(value) >= 1 and jnp.shape(value)[0] == rows
