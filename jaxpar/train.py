"""`make_train_step`: the one train step that every strategy shares."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from jaxpar.batch import match_path
from jaxpar.integers import is_integer
from jaxpar.layout import Layout
from jaxpar.loss import LossError, call_model, grow, is_weighted, mean_value, read_loss, sum_values
from jaxpar.state import StateError, Static, TrainState, is_key, join_params, leaf_path, split_params
from jaxpar.step import Step
from jaxpar.strategy import Strategy, cast_params, check_compute_dtype, check_strategy, check_takes, param_specs

LossFn = Callable[[Any, Any, jax.Array], Any]
_OWN_METRICS = ("loss", "grad_norm", "skipped")


def make_train_step(
    loss_fn: LossFn,
    strategy: Strategy,
    *,
    num_microbatches: int = 1,
    compute_dtype: Any = None,
    compiler_options: dict[str, Any] | None = None,
) -> Step:
    """Returns `train_step(state, batch) -> (state, metrics)`, which computes the same under every strategy.

    The loss and its gradient are Σ total / Σ weight over all shards and microbatches; gradients are summed once a step
    over each batch axis that splits no parameter, but not over `data` beside `fsdp` and `stage` or `model`, where XLA
    would end the process. A step whose total weight is 0, or whose float16 gradients are not finite, changes nothing
    but the step's number, and counts 1 in the metric `skipped`.

    Args:
      loss_fn: `loss_fn(model, batch, rng)` gives `(loss, metrics)`. The model is a live nnx module, or the linen
        variables; a linen one that changes collections gives them third. The loss is a mean over the examples, a vector
        of one value an example, or `jaxpar.Weighted(total, weight)`; so is each metric.
      strategy: where to run it.
      num_microbatches: into how many parts to cut the batch, run one after the other; part m is rows m::n.
      compute_dtype: the dtype in which the model sees floating-point parameters, as `jnp.bfloat16`; they are kept, and
        updated, in their own. `jnp.float16` needs `dynamic_scale` in the state.
      compiler_options: XLA's, by name, for `jax.jit`.

    Returns:
      The step. It donates the memory of its state. Metrics are `loss`, `grad_norm` (before any clipping) and the
      function's own, with `skipped` where steps can be.

    Raises:
      ValueError: an argument that can't be; at the first call, a metric whose name is taken, rows that don't divide.
      TypeError: `loss_fn` is no function, or `strategy` no strategy.
      StateError: `loss_fn` takes other arguments; at the first call, the state is none that it can train.

    >>> import jaxpar
    >>> from flax import nnx
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=-1))
    >>> loss_fn = lambda model, batch, rng: (((model(batch["x"]) - 1) ** 2).mean(), {})
    >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(3, 1, rngs=nnx.Rngs(rng)), optax.sgd(0.1))
    >>> state, step = strategy.init(init_fn, jax.random.key(0)), make_train_step(loss_fn, strategy)
    >>> state, metrics = step(state, strategy.shard_batch({"x": [[1.0, 2.0, 3.0]] * 8}))
    >>> sorted(metrics), int(state.step)
    (['grad_norm', 'loss'], 1)
    """
    if not is_integer(num_microbatches):
        raise ValueError(f"num_microbatches is {num_microbatches!r}; give a whole number, 1 or more.")
    check_compute_dtype(compute_dtype)
    check_strategy(strategy)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is {loss_fn!r}; give a function loss_fn(model, batch, rng) -> (loss, metrics).")
    check_takes(loss_fn, "loss_fn", "model", "batch", "rng")

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        _check_state(state, compute_dtype)
        layout = strategy.layout(state)
        axes = strategy.train_axes(layout, num_microbatches)
        plan = _Plan(loss_fn, strategy, layout, state.static, axes, num_microbatches, compute_dtype)
        carry = _Carry(
            *split_params(state.params, state.static.frozen),
            state.model_state,
            state.rng,
            state.step,
            None if state.dynamic_scale is None else state.dynamic_scale.scale,
        )
        sum_shard = functools.partial(_sum_gradients, plan)
        return _update(state, strategy.engine.run_shards(sum_shard, axes, batch)(carry, batch))

    return Step(
        strategy,
        train_step,
        num_microbatches=int(num_microbatches),
        compute_dtype=compute_dtype,
        compiler_options=compiler_options,
    )


class _Plan(NamedTuple):
    """What of a step is fixed when it is traced."""

    loss_fn: LossFn
    strategy: Strategy
    layout: Layout
    static: Static
    axes: tuple[str, ...]
    num_microbatches: int
    compute_dtype: Any


class _Carry(NamedTuple):
    """What of a state the gradients depend on."""

    trained: Any
    frozen: Any
    model_state: Any
    rng: jax.Array
    step: jax.Array
    scale: Any


class _Sums(NamedTuple):
    """Sums over the batch: of gradients, and of the loss and metrics as `Weighted`; and the model's state after it."""

    gradients: Any
    values: Any
    model_state: Any


def _sum_gradients(plan: _Plan, carry: _Carry, batch: Any) -> _Sums:
    """The sums over the rows that this call sees, and then over the other shards where the compiler doesn't."""
    if plan.num_microbatches == 1:
        sums = _sum_microbatch(plan, carry, carry.model_state, 0, batch)
    else:
        sums = _sum_microbatches(plan, carry, batch)
    if not plan.axes:
        return sums
    # The one reduction of the step. Everything above is a part of a sum, so nothing is left to divide by.
    gradients, values = jax.lax.psum((sums.gradients, sums.values), plan.axes)
    average = lambda leaf: jax.lax.pmean(leaf, plan.axes) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
    return _Sums(gradients, values, jax.tree.map(average, sums.model_state))


def _sum_microbatch(plan: _Plan, carry: _Carry, model_state: Any, number: Any, rows: Any) -> _Sums:
    """The sums over one microbatch: the forward and the backward pass."""
    shards = math.prod(jax.lax.axis_size(axis) for axis in plan.axes)
    device = (jax.lax.axis_index(plan.axes),) if plan.axes else ()

    def objective(trained: Any) -> tuple[jax.Array, Any]:
        params = cast_params(join_params(trained, carry.frozen), plan.layout, plan.strategy, plan.compute_dtype)

        def call(rows: Any, extra: tuple) -> tuple[Any, Any]:
            keys = (carry.rng, carry.step, number, *device, *extra)
            result, after = call_model(plan.loss_fn, plan.static, params, model_state, rows, keys)
            loss, metrics, _ = read_loss(result)
            _check_metrics(metrics)
            return {**metrics, "loss": loss}, after

        fraction = 1 / (shards * plan.num_microbatches)
        sum_rows = lambda: sum_values(call, rows, model_state, fraction=fraction, is_shared=plan.strategy.shared)
        values, after = plan.strategy.engine.keep_rows(sum_rows, plan.layout, plan.axes, rows)()
        total = values["loss"].total
        return (total if carry.scale is None else total * carry.scale), (values, after)

    gradients, (values, after) = jax.grad(objective, has_aux=True)(carry.trained)
    return _Sums(_keep_split(gradients, plan), values, after)


def _sum_microbatches(plan: _Plan, carry: _Carry, batch: Any) -> _Sums:
    """The sums over the microbatches, one after the other; microbatch m is rows m::n, so that no row moves.

    Weights split over a batch axis are gathered in each microbatch. (So the TPU compiler leaves it, as its text for a
    v5e shows; XLA on CPU moves the gathers out of the loop.)
    """
    count = plan.num_microbatches
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    is_cut = [bool(leaf.ndim) and not plan.strategy.shared(match_path(path)) for path, leaf in leaves]
    stacked = [
        jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0) if cut else None
        for (_, leaf), cut in zip(leaves, is_cut, strict=True)
    ]

    def body(before: tuple[Any, Any], part: tuple[jax.Array, list[Any]]) -> tuple[tuple[Any, Any], Any]:
        (gradients, model_state), (number, arrays) = before, part
        rows = [array if cut else leaf for array, (_, leaf), cut in zip(arrays, leaves, is_cut, strict=True)]
        sums = _sum_microbatch(plan, carry, model_state, number, jax.tree.unflatten(treedef, rows))
        gradients = jax.tree.map(lambda total, part: total + part.astype(total.dtype), gradients, sums.gradients)
        return (_keep_split(gradients, plan), sums.model_state), sums.values

    zeros = _keep_split(jax.tree.map(lambda leaf: jnp.zeros_like(grow(leaf)), carry.trained), plan)
    (gradients, model_state), values = jax.lax.scan(body, (zeros, carry.model_state), (jnp.arange(count), stacked))
    return _Sums(gradients, jax.tree.map(lambda leaf: leaf.sum(0), values), model_state)


def _keep_split(gradients: Any, plan: _Plan) -> Any:
    """The gradients, kept split as their parameters are while they are summed."""
    specs = param_specs(plan.layout)

    def keep(path: tuple, leaf: jax.Array) -> jax.Array:
        spec = specs["params/" + leaf_path(path)]
        return plan.strategy.engine.constrain(leaf, spec) if any(spec) else leaf

    return jax.tree_util.tree_map_with_path(keep, gradients)


def _update(state: TrainState, sums: _Sums) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after the optimizer's step, and the metrics."""
    weight = sums.values["loss"].weight
    trained, frozen = split_params(state.params, state.static.frozen)
    factor, take = None, None
    if weight is not None:
        take = weight != 0
        factor = jnp.where(take, 1 / jnp.where(take, weight, 1), 0)
    gradients, dynamic_scale = sums.gradients, state.dynamic_scale
    if dynamic_scale is not None:
        factor = (1 if factor is None else factor) / dynamic_scale.scale
    if factor is not None:
        gradients = jax.tree.map(lambda leaf: grow(leaf) * factor, gradients)
    if dynamic_scale is not None:
        finite = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)]))
        take = finite if take is None else take & finite
        dynamic_scale = _next_scale(dynamic_scale, finite)
    metrics = {name: jax.tree.map(mean_value, value, is_leaf=is_weighted) for name, value in sums.values.items()}
    metrics["grad_norm"] = optax.tree.norm(jax.tree.map(grow, gradients))
    gradients = jax.tree.map(lambda leaf, param: leaf.astype(param.dtype), gradients, trained)
    extra = {"value": metrics["loss"]} if _takes_value(state.static.tx) else {}
    try:
        updates, opt_state = state.static.tx.update(gradients, state.opt_state, trained, **extra)
    except (TypeError, AttributeError) as error:
        raise StateError(
            f"The optimizer can't be used: its update raised {type(error).__name__}: {error}. A step calls "
            "tx.update(gradients, opt_state, params), with value= for one that takes the loss."
        ) from error
    after = (optax.apply_updates(trained, updates), opt_state, sums.model_state)
    if take is not None:
        before = (trained, state.opt_state, state.model_state)
        after = jax.tree.map(lambda new, old: jnp.where(take, new, old), after, before)
        metrics["skipped"] = 1.0 - take.astype(jnp.float32)
    trained, opt_state, model_state = after
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=join_params(trained, frozen),
        opt_state=opt_state,
        model_state=model_state,
        dynamic_scale=dynamic_scale,
    ), metrics


def _takes_value(tx: optax.GradientTransformation) -> bool:
    """Whether an optimizer wants the loss too, as optax's reduce_on_plateau does."""
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return False
    parameters = inspect.signature(tx.update).parameters.values()
    return any(parameter.name == "value" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _next_scale(dynamic_scale: DynamicScale, finite: jax.Array) -> DynamicScale:
    """Flax's own rule for the next scale, told of all gradients by one number that is finite if they all are."""
    probe = jnp.where(finite, 1.0, jnp.nan)
    return dynamic_scale.value_and_grad(lambda x: x * probe)(1.0)[0]


def _check_state(state: Any, compute_dtype: Any) -> None:
    if not isinstance(state, TrainState):
        raise StateError(f"The state is a {type(state).__name__}; the train step takes a jaxpar.TrainState.")
    if not is_key(state.rng) or state.rng.ndim:
        given = f"of shape {state.rng.shape}" if is_key(state.rng) else f"a {type(state.rng).__name__}"
        raise StateError(f"The state's rng is {given}; the train step folds one typed key, as jax.random.key(0).")
    if compute_dtype is not None and jnp.dtype(compute_dtype) == jnp.float16 and state.dynamic_scale is None:
        raise StateError(
            "compute_dtype is float16, but the state has no dynamic_scale: its gradients would underflow. Create "
            "it with TrainState.create(..., dynamic_scale=flax.training.dynamic_scale.DynamicScale())."
        )


def _check_metrics(metrics: Any) -> None:
    taken = sorted(set(metrics) & set(_OWN_METRICS))
    if taken:
        raise LossError(
            f"loss_fn returned metrics named {taken}, which the step gives itself ({', '.join(_OWN_METRICS)}); rename "
            "them."
        )
