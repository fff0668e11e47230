"""One device's own training, written out by hand in plain JAX: what the assertions compare every strategy with.

It shares none of the builder's arithmetic: microbatches are a Python loop, shards a `vmap`, sums are written out here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util

from jaxpar.batch import EXAMPLE_WEIGHT, count_rows, match_path
from jaxpar.loss import Weighted
from jaxpar.mesh import ROW_AXIS
from jaxpar.narrowing import find_narrowings
from jaxpar.state import TrainState, join_params, split_params


class View(NamedTuple):
    """What of a batch one call of the model sees.

    Attributes:
      shards: name and size of each axis over which a step sees one shard; none where it sees the whole batch.
      axis_name: the name that is bound for the model's own reductions.
      num_microbatches: into how many parts the batch is cut.
      shared: the paths of the batch's leaves that every shard sees whole.
      compute_dtype: the dtype in which the model sees its parameters.
    """

    shards: tuple[tuple[str, int], ...]
    axis_name: str
    num_microbatches: int = 1
    shared: frozenset[str] = frozenset()
    compute_dtype: Any = None

    @property
    def axes(self) -> dict[str, int]:
        """The shards' axes, and the one that the model may name, of size 1 where the step sees all."""
        return {**({} if self.axis_name in dict(self.shards) else {self.axis_name: 1}), **dict(self.shards)}

    def is_shared(self, path: str) -> bool:
        """Whether every shard sees a batch leaf whole."""
        return path in self.shared


class Played(NamedTuple):
    """What one step of one device gave: the state after it, the metrics, and the trained parameters' gradients."""

    state: TrainState
    metrics: dict[str, Any]
    gradients: Any


def one_device_step(loss_fn: Callable[..., Any], view: View) -> Callable[[TrainState, Any], Played]:
    """Returns `step(state, batch)`, one device that plays each microbatch in turn, and all shards side by side.

    >>> state = TrainState.create(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    >>> step = one_device_step(lambda model, batch, rng: model(batch["x"]).mean(), View((("data", 2),), "data"))
    >>> sorted(step(state, {"x": np.ones((4, 3))}).metrics)
    ['grad_norm', 'loss', 'skipped']
    """
    play, update = _compiled(jax.default_backend())

    def step(state: TrainState, batch: Any) -> Played:
        rows = count_rows(batch, view.is_shared)
        so_far: Any = None
        model_states = _spread(view, state.model_state)
        for number in range(view.num_microbatches):
            part = _take_rows(batch, number, view)
            *more, model_states = play(loss_fn, view, state, model_states, part, number, rows)
            so_far = more if so_far is None else _add(so_far, more)
        return update(view, state, *so_far, model_states, rows)

    return step


@functools.cache
def _compiled(platform: str) -> tuple[Callable, Callable]:
    """The two halves of a step, compiled once for all strategies of one view, if their functions are the same."""
    # Half of a test's time was LLVM's passes over what runs but a few times.
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
    return (
        jax.jit(_play_microbatch, static_argnums=(0, 1), compiler_options=options),
        jax.jit(_update, static_argnums=0, compiler_options=options),
    )


def find_narrowed_loss(loss_fn: Callable[..., Any], view: View, state: TrainState, batch: Any) -> tuple[str, ...]:
    """Returns the operations by which the loss of the first microbatch leaves float64, as `find_narrowings` does."""
    part, rows = _take_rows(batch, 0, view), count_rows(batch, view.is_shared)

    def total(state: TrainState, model_states: Any) -> jax.Array:
        return _play_microbatch(loss_fn, view, state, model_states, part, 0, rows)[1]["loss"].total

    return find_narrowings(total, state, _spread(view, state.model_state))


def _play_microbatch(
    loss_fn: Callable[..., Any], view: View, state: TrainState, model_states: Any, batch: Any, number: Any, rows: Any
) -> tuple[Any, Any, Any]:
    """The gradients of one microbatch, its sums, and the model's state on each shard after it."""
    axes = view.axes
    trained, frozen = split_params(state.params, state.static.frozen)
    scale = 1 if state.dynamic_scale is None else state.dynamic_scale.scale

    def objective(trained: Any) -> tuple[jax.Array, Any]:
        params = join_params(trained, frozen)
        if view.compute_dtype is not None:
            floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
            params = jax.tree.map(lambda leaf: leaf.astype(view.compute_dtype) if floating(leaf) else leaf, params)

        def play_shard(model_state: Any, batch: Any, index: jax.Array) -> tuple[Any, Any]:
            numbers = (state.step, number, index) if view.shards else (state.step, number)
            return _sum_shard(loss_fn, state, params, model_state, batch, numbers, view.is_shared)

        for axis in reversed(axes):
            play_shard = jax.vmap(play_shard, axis_name=axis)
        index = jnp.arange(math.prod(axes.values())).reshape(*axes.values())
        sums, after = play_shard(model_states, batch, index)
        sums = jax.tree.map(jnp.sum, sums)
        return sums["loss"].total / rows * scale, (sums, after)

    gradients, (sums, after) = jax.grad(objective, has_aux=True)(trained)
    return jax.tree.map(_wide, gradients), sums, after


@jax.jit
def _add(so_far: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, so_far, more)


@functools.partial(jax.jit, static_argnums=0)
def _spread(view: View, model_state: Any) -> Any:
    """The model's state, once a shard."""
    sizes = tuple(view.axes.values())
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*sizes, *leaf.shape)), model_state)


def _take_rows(batch: Any, number: int, view: View) -> Any:
    """Rows m::n of each shard's rows, with leading dims for the shards; shared leaves whole, once a shard."""
    sizes = tuple(view.axes.values())

    def take(path: tuple, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if not leaf.ndim or view.is_shared(match_path(path)):
            return np.broadcast_to(leaf, (*sizes, *leaf.shape))
        shards = leaf.reshape(math.prod(sizes), -1, *leaf.shape[1:])[:, number :: view.num_microbatches]
        return shards.reshape(*sizes, *shards.shape[1:])

    return jax.tree_util.tree_map_with_path(take, batch)


def _average(leaf: jax.Array, dims: int) -> jax.Array:
    return leaf.mean(tuple(range(dims))) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[(0,) * dims]


def _sum_shard(
    loss_fn: Callable, state: TrainState, params: Any, model_state: Any, batch: Any, numbers: tuple, is_shared: Callable
) -> tuple[dict[str, Any], Any]:
    """The loss and metrics over one shard's rows as sums, and the model's state after them."""
    rows = count_rows(batch, is_shared)
    weight = None
    if isinstance(batch, Mapping) and EXAMPLE_WEIGHT in batch:
        weight = batch[EXAMPLE_WEIGHT]
        batch = {name: leaf for name, leaf in batch.items() if name != EXAMPLE_WEIGHT}

    def call(batch: Any, *extra: Any) -> tuple[dict[str, Any], Any]:
        return _call(loss_fn, state, params, model_state, batch, (*numbers, *extra))

    values, after = call(batch)
    if weight is not None and not all(map(functools.partial(_is_per_row, rows), _flatten(values))):
        values = _row_by_row(lambda row, number: call(row, number)[0], batch, rows, is_shared)
    return jax.tree.map(lambda value: _add_up(value, weight, rows), values, is_leaf=_is_weighted), after


def _call(
    loss_fn: Callable, state: TrainState, params: Any, model_state: Any, batch: Any, numbers: tuple
) -> tuple[dict[str, Any], Any]:
    def fold(key: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, numbers, key)

    def fold_all(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return functools.reduce(lambda mapped, _: jax.vmap(mapped), leaf.shape, fold)(leaf)

    own_keys = state.static.rng_collections
    seen = {name: jax.tree.map(fold_all, leaf) if name in own_keys else leaf for name, leaf in model_state.items()}
    model = dataclasses.replace(state, params=params, model_state=seen).model
    result = loss_fn(model, batch, fold(state.rng))
    loss, metrics, *updates = result if isinstance(result, tuple) else (result, {})
    if isinstance(model, nnx.Module):
        now = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}
        after = {
            path: leaf if path[0] in own_keys else now[path[1:]]
            for path, leaf in traverse_util.flatten_dict(model_state).items()
        }
        after = traverse_util.unflatten_dict(after)
    else:
        after = {**model_state, **(updates[0] if updates and updates[0] else {})}
    after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, model_state)
    return {**metrics, "loss": loss}, after


def _row_by_row(call: Callable, batch: Any, rows: int, is_shared: Callable[[str], bool]) -> Any:
    """What `call` gives for each row by itself, as if it were a batch of one."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    in_axes = [None if not leaf.ndim or is_shared(match_path(path)) else 0 for path, leaf in leaves]

    def call_one(number: jax.Array, arrays: list[jax.Array]) -> Any:
        lone = [leaf if axis is None else leaf[None] for leaf, axis in zip(arrays, in_axes, strict=True)]
        return jax.tree.map(_reduce_one, call(jax.tree.unflatten(treedef, lone), number), is_leaf=_is_weighted)

    return jax.vmap(call_one, in_axes=(0, in_axes), axis_name=ROW_AXIS)(jnp.arange(rows), [leaf for _, leaf in leaves])


def _reduce_one(value: Any) -> Any:
    return Weighted(jnp.sum(value.total), jnp.sum(value.weight)) if _is_weighted(value) else jnp.mean(value)


def _add_up(value: Any, row_weight: jax.Array | None, rows: int) -> Weighted:
    """A value as a sum over the rows and the weight of that sum."""
    if _is_weighted(value):
        factor = 1 if row_weight is None else row_weight
        return Weighted(jnp.sum(_wide(value.total) * factor), jnp.sum(_wide(value.weight) * factor))
    value = _wide(value)
    if row_weight is None:
        return Weighted(value.mean() * rows, jnp.asarray(rows, value.dtype))
    return Weighted((value.reshape(rows, -1).mean(1) * row_weight).sum(), _wide(row_weight).sum())


def _wide(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _is_weighted(value: Any) -> bool:
    return isinstance(value, Weighted)


def _flatten(values: Any) -> list[Any]:
    return jax.tree.leaves(values, is_leaf=_is_weighted)


def _is_per_row(rows: int, value: Any) -> bool:
    if _is_weighted(value):
        return jnp.shape(value.total) == jnp.shape(value.weight) == (rows,)
    return jnp.shape(value)[:1] == (rows,)


def _update(view: View, state: TrainState, gradients: Any, sums: Any, model_states: Any, rows: Any) -> Played:
    """The optimizer's step on the mean gradient; none where nothing weighs anything or a gradient is not finite."""
    model_state = jax.tree.map(lambda leaf: _average(leaf, len(view.axes)), model_states)
    weight = sums["loss"].weight / rows
    take, dynamic_scale = weight != 0, state.dynamic_scale
    divisor = jnp.where(weight == 0, 1, weight) * (1 if dynamic_scale is None else dynamic_scale.scale)
    gradients = jax.tree.map(lambda leaf: jnp.where(weight == 0, 0, leaf / divisor), gradients)
    if dynamic_scale is not None:
        finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)]).all()
        take, dynamic_scale = take & finite, _next_scale(dynamic_scale, finite)
    metrics = jax.tree.map(_divide, sums, is_leaf=_is_weighted)
    metrics["grad_norm"] = jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(gradients)))
    metrics["skipped"] = jnp.where(take, 0.0, 1.0)
    trained, frozen = split_params(state.params, state.static.frozen)
    gradients = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), gradients, trained)
    tx = optax.with_extra_args_support(state.static.tx)
    updates, opt_state = tx.update(gradients, state.opt_state, trained, value=metrics["loss"])
    old = trained, state.opt_state, state.model_state
    new = optax.apply_updates(trained, updates), opt_state, model_state
    trained, opt_state, model_state = jax.tree.map(lambda new, old: jnp.where(take, new, old), new, old)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=join_params(trained, frozen),
        opt_state=opt_state,
        model_state=model_state,
        dynamic_scale=dynamic_scale,
    )
    return Played(state, metrics, gradients)


def _divide(value: Weighted) -> jax.Array:
    return jnp.where(value.weight == 0, 0, value.total / jnp.where(value.weight == 0, 1, value.weight))


def _next_scale(dynamic_scale: Any, finite: jax.Array) -> Any:
    grows = finite & (dynamic_scale.fin_steps == dynamic_scale.growth_interval)
    largest, smallest = jnp.finfo(jnp.float32).max, dynamic_scale.minimum_scale
    grown = jnp.minimum(dynamic_scale.scale * dynamic_scale.growth_factor, largest)
    shrunk = dynamic_scale.scale * dynamic_scale.backoff_factor
    shrunk = shrunk if smallest is None else jnp.maximum(shrunk, smallest)
    return dynamic_scale.replace(
        fin_steps=jnp.where(finite & ~grows, dynamic_scale.fin_steps + 1, 0),
        scale=jnp.where(finite, jnp.where(grows, grown, dynamic_scale.scale), shrunk),
    )
