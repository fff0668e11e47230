"""Stacks of layers as functions of plain leaves, and microbatches of rows: what a pipeline is made of."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from jaxpar.integers import is_integer
from jaxpar.loss import fold_leaf
from jaxpar.mesh import BATCH_AXES
from jaxpar.state import is_key

STAGE = "stage"
# Counts of random draws are the step's affair, and nnx.remat gives parameters back as other tracers.
_MAY_CHANGE = (nnx.RngState, nnx.Param)


class PipelineError(ValueError):
    """Layers, rows or microbatches that can't be laid out over stages: the message gives both numbers."""


class Part(NamedTuple):
    """A part of a model: `fn(leaves, *args, microbatch)`, and its leaves."""

    fn: Callable[..., Any]
    leaves: list[Any]


_HOW_TO_STACK = (
    "Equal layers are a stack, each leaf with a leading dim of layers: "
    "nnx.split_rngs(splits=4)(nnx.vmap(lambda rngs: Block(rngs)))(rngs)."
)


def as_part(part: Any) -> Part:
    """Returns an nnx module, or a function and its parameters, as a function of plain leaves.

    The microbatch is folded into every typed random key that it gets.
    """
    fn, node = part if isinstance(part, tuple) and len(part) == 2 else (None, part)
    if (fn is None and not isinstance(node, nnx.Module)) or not (fn is None or callable(fn)):
        raise PipelineError(
            f"A part of the model is a {type(part).__name__}; give an nnx module, or (fn, params). {_HOW_TO_STACK}"
        )
    is_module = lambda leaf: isinstance(leaf, nnx.Module)
    if not any(map(is_module, jax.tree.leaves(node, is_leaf=is_module))):
        check_leaves(node, "params")
        leaves, treedef = jax.tree.flatten(node)

        def call(leaves: Any, *args: Any) -> Any:
            leaves, given = _fold_keys((leaves, args[:-1]), args[-1])
            return fn(jax.tree.unflatten(treedef, leaves), *given)  # pyright: ignore

        return Part(call, leaves)
    graphdef, state = nnx.split(node)
    leaves, treedef = jax.tree.flatten(state)

    def call_nnx(leaves: Any, *args: Any) -> Any:
        leaves, given = _fold_keys((leaves, args[:-1]), args[-1])
        state = jax.tree.unflatten(treedef, leaves)
        # copy=True: without it counters keep the trace in which they were made.
        merged: Any = nnx.merge(graphdef, state, copy=True)
        out = merged(*given) if fn is None else fn(merged, *given)
        _check_unchanged(state, nnx.state(merged))
        return out

    return Part(call_nnx, leaves)


def run_layers(fn: Callable[..., Any], leaves: Any, x: Any, more: Any, number: Any) -> Any:
    """Returns `x` after each layer of the stacked leaves in turn; its rows stay split over the batch axes."""
    return lax.scan(lambda x, layer: (fn(layer, x, *more, number), None), jax.tree.map(_split_rows, x), leaves)[0]


def _split_rows(leaf: jax.Array) -> jax.Array:
    # The builder does so for a scan of the model's own, but doesn't look into an island: see carries.py for why.
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes)
    if not axes or not np.ndim(leaf) or leaf.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return leaf
    free = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
    return lax.with_sharding_constraint(leaf, PartitionSpec(axes, *free))


def when(active: Any, do: Callable[..., Any], otherwise: Callable[..., Any], *operands: Any, anyone: Any = True) -> Any:
    """Returns what `do` gives where this stage is `active`, and what `otherwise` gives elsewhere.

    Stages that aren't leave `do` out, by `lax.cond`, if they are all that a device shares with others, and `do` holds
    no permute: XLA makes it one for the devices of all stages, and those of a stage that left it out would be waited
    for. Beside axes that are the compiler's any `do` may hold one. There every stage computes both, and takes one,
    unless `anyone`, alike at all stages, says that none is active. No time is lost by it: stages go in step, and wait
    for the one that is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_alone = all(size == 1 or axis in mesh.manual_axes for axis, size in mesh.shape.items())
    if is_alone and "ppermute" not in str(jax.make_jaxpr(do)(*operands)):
        return lax.cond(active, do, otherwise, *operands)

    def both(*operands: Any) -> Any:
        pick = lambda a, b: jnp.where(active, a, b)
        # What a stage that isn't active computes has no gradient: on rows that aren't its own it may be no number, and
        # no number times 0 is none.
        mine = jax.tree.map(lambda x: pick(x, lax.stop_gradient(x)) if _is_float(jnp.result_type(x)) else x, operands)
        return jax.tree.map(pick, do(*mine), otherwise(*operands))

    return both(*operands) if anyone is True else lax.cond(anyone, both, otherwise, *operands)


def widen(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns the tree in float32 or wider, and what casts it back to its dtypes.

    What is used for all microbatches enters wide: its gradient is their sum. So does what every stage has whole: its
    gradient is a sum over stages, which XLA on CPU can't do in bfloat16.
    """
    dtypes = jax.tree.map(jnp.result_type, tree)
    # What is wide stays as it is: a Python number made an array would no longer take the dtype of what it meets.
    grow = lambda leaf, dtype: jnp.asarray(leaf, jnp.float32) if is_narrow(dtype) else leaf
    back = lambda leaf, dtype: leaf.astype(dtype) if is_narrow(dtype) else leaf
    return jax.tree.map(grow, tree, dtypes), lambda wide: jax.tree.map(back, wide, dtypes)


def is_narrow(dtype: Any) -> bool:
    """Returns whether a dtype is a floating-point one of fewer bits than float32."""
    return _is_float(dtype) and jnp.finfo(dtype).bits < 32


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def put(slots: Any, part: Any, number: Any) -> Any:
    """Returns the slots, each leaf's dim 0, with `part` as the one of this number."""
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, number, 0), slots, part)


def send(tree: Any, stages: int, *, back: bool = False) -> Any:
    """Returns what the stage before this one has, or the one after it if `back`; zeros where there is none."""
    pairs = [(i + 1, i) if back else (i, i + 1) for i in range(stages - 1)]
    return lax.ppermute(tree, STAGE, pairs)


def take_microbatch(batch: Any, count: int, number: Any) -> Any:
    """Returns microbatch `number` of `count` of a batch; scalars are whole for each."""
    return jax.tree.map(lambda leaf: take_rows(leaf, count, number) if np.ndim(leaf) else leaf, batch)


def take_rows(leaf: Any, count: int, number: Any) -> jax.Array:
    """Returns rows m::n of an array, so that no row moves from one shard of the data to another."""
    parts = jnp.reshape(leaf, (-1, count, *np.shape(leaf)[1:]))
    return lax.dynamic_index_in_dim(parts, jnp.clip(number, 0, count - 1), 1, keepdims=False)


def split_floats(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
    """Returns the leaves that have a gradient and the others, each with None in the others' places."""
    is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) if not is_key(leaf) else False for leaf in leaves]
    floats = [leaf if kept else None for leaf, kept in zip(leaves, is_float, strict=True)]
    return floats, [None if kept else leaf for leaf, kept in zip(leaves, is_float, strict=True)]


def join_floats(floats: list[Any], others: list[Any]) -> list[Any]:
    """Returns the leaves whole again: the inverse of `split_floats`."""
    return [other if leaf is None else leaf for leaf, other in zip(floats, others, strict=True)]


def split_tree(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns the leaves that have a gradient, with None for others, and what makes the whole tree of such leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    floats, others = split_floats(leaves)
    return floats, lambda floats: jax.tree.unflatten(treedef, join_floats(floats, others))


def count_rows(tree: Any, name: str) -> int:
    """Returns how many rows a pytree of arrays has, scalars left out; raises PipelineError where they differ."""
    check_leaves(tree, name)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree) if np.ndim(leaf)]
    counts = {shape[0] for shape in shapes}
    if len(counts) != 1:
        raise PipelineError(f"{name} has arrays of shapes {shapes}; give arrays with the same number of rows in dim 0.")
    return counts.pop()


def check_leaves(tree: Any, name: str) -> None:
    """Raises PipelineError for a leaf that is neither a number nor an array of numbers or random keys."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        try:
            jax.typeof(leaf)
        except TypeError:
            given = f"{name}{jax.tree_util.keystr(path)} is {leaf!r}, a {type(leaf).__name__}"
            raise PipelineError(f"{given}; give numbers, or arrays of them, and text outside of the pytree.") from None


def check_microbatches(count: Any, rows: int, stages: int) -> None:
    """Raises PipelineError unless there are enough microbatches for the stages, and they divide the rows."""
    if not is_integer(count):
        raise PipelineError(f"stage_microbatches is {count!r}; give a whole number, 1 or more.")
    if count < stages:
        raise PipelineError(
            f"stage_microbatches is {count}, but there are {stages} stages, some of which would always idle; give "
            f"{stages} or more, better {4 * stages}."
        )
    if rows % count:
        raise PipelineError(
            f"{rows} rows do not divide by {count} stage microbatches; pad to {rows - rows % count + count} a shard of "
            f"the data, or give a divisor of {rows}, as stage_microbatches={math.gcd(rows, int(count))}."
        )


class Trace(NamedTuple):
    """What a function does: the shapes it gives, and the values that it uses without being given, to differentiate."""

    shapes: Any
    captured: list[Any]


def trace(fn: Callable[..., Any], *args: Any) -> Trace:
    """Returns what `fn(*args)` would do."""
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    # JAX has no public name for the tracers of a derivative.
    is_differentiated = lambda const: type(const).__name__ in ("JVPTracer", "LinearizeTracer")
    return Trace(shapes, list(filter(is_differentiated, jaxpr.consts)))


def check_captured(name: str, traced: Trace, stages: int) -> None:
    """Raises PipelineError for a narrow float that isn't given, but used and differentiated: nobody widens it.

    Its gradient is a sum over stages, at which XLA on CPU ends the process if it is in bfloat16.
    """
    narrow = [value for value in traced.captured if stages > 1 and is_narrow(value.dtype)]
    if narrow:
        raise PipelineError(
            f"{name} uses a {narrow[0].dtype} value of shape {narrow[0].shape}, to be differentiated, that it isn't "
            "given: its gradient, a sum over stages, would be as narrow. Give it as an argument, after x or as one of "
            "the parameters, by (fn, params)."
        )


def check_layers(run: Part, x: Any, more: Any, stages: int) -> Trace:
    """Returns what a layer does; raises PipelineError unless the stack divides by the stages, and keeps x's shape."""
    shapes = [np.shape(leaf) for leaf in run.leaves]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or counts == {()}:
        raise PipelineError(
            f"The blocks have leaves of shapes {shapes}; a stack's leaves share a leading dim of layers. "
            f"{_HOW_TO_STACK}"
        )
    ((layers,),) = counts
    if not layers:
        raise PipelineError(f"The blocks have leaves of shapes {shapes}: 0 layers; give {stages} or more.")
    if layers % stages:
        raise PipelineError(f"{layers} layers do not divide by {stages} stages; give a multiple of {stages}.")
    if any(map(is_key, jax.tree.leaves(x))):
        raise PipelineError(
            "x holds random keys, which don't travel between stages; give them after x to pipeline, or make x of "
            "jax.random.key_data(keys), and let each layer use jax.random.wrap_key_data."
        )
    check_leaves(more, "more")
    first = [jax.eval_shape(lambda leaf: leaf[0], leaf) for leaf in run.leaves]
    given = jax.tree.map(lambda leaf: (np.shape(leaf), jnp.result_type(leaf)), x)
    try:
        traced = trace(lambda leaves, x, more: run.fn(leaves, x, *more, 0), first, x, more)
    except (TypeError, ValueError) as error:
        rows = count_rows(x, "x")
        longer = [np.shape(leaf) for leaf in jax.tree.leaves(more) if np.ndim(leaf) and np.shape(leaf)[0] > rows]
        if not longer:
            raise
        raise PipelineError(
            f"A layer can't take a microbatch of {rows} rows beside an argument of shape {longer[0]}: what follows x "
            "is whole for every microbatch. Put what has rows into x, a pytree, which the layer gives back."
        ) from error
    made = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), traced.shapes)
    if made != given:
        raise PipelineError(
            f"A layer turns x from {given} into {made}; the next one needs it as it was. {_HOW_TO_STACK}"
        )
    return traced


def _check_unchanged(before: Any, after: Any) -> None:
    old = dict(nnx.to_flat_state(before))
    for path, variable in nnx.to_flat_state(after):
        if not isinstance(variable, _MAY_CHANGE) and variable.get_value() is not old[path].get_value():
            raise PipelineError(
                f"{'/'.join(map(str, path))!r} changes while a layer runs, as BatchNorm's statistics do; a pipeline "
                "has no order in which to change it. Use a norm without running statistics, as nnx.LayerNorm."
            )


def _fold_keys(tree: Any, number: Any) -> Any:
    return jax.tree.map(lambda leaf: fold_leaf(leaf, (number,)), tree)
