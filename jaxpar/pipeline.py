"""Pipeline parallelism: a stack of layers split over the `stage` axis, through which microbatches flow (GPipe).

One program runs on every device of the axis. What a stage gives goes to the next one by `lax.ppermute`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxpar.island import island_size, jit_island, takes_rows_alone
from jaxpar.stack import (
    STAGE,
    PipelineError,
    as_part,
    check_captured,
    check_layers,
    check_microbatches,
    count_rows,
    put,
    run_layers,
    send,
    take_microbatch,
    take_rows,
    when,
    widen,
)


def pipeline(blocks: Any, x: Any, *more: Any, stage_microbatches: int) -> Any:
    """Returns `x` after each of a stack of equal layers, which the mesh axis `stage` splits: GPipe.

    Each device runs its layers on one microbatch after the other (Huang et al. 2018,
    https://arxiv.org/abs/1811.06965), and keeps of each but its input for the backward pass. Without a `stage` axis the
    microbatches run one after the other, so that what they draw, or measure over their rows, is the same on every mesh.

    Args:
      blocks: the stack, each leaf with a leading dim of layers: an nnx module as `nnx.vmap` makes it, called as
        `block(x, *more)`, or a pair `(fn, params)`, called as `fn(layer_params, x, *more)`. Random keys among the
        leaves, made by `jax.random.key`, have the microbatch folded in. `jaxpar.PIPELINE` splits what is named
        `blocks` or `layers`.
      x: a pytree of arrays, their rows in dim 0; the layers give it back with its shapes and dtypes.
      *more: further arguments that every layer gets whole, for all rows: a random key, into which the microbatch is
        folded, or what has no rows. What has rows, as a mask of each one, belongs in `x`.
      stage_microbatches: into how many parts to cut the rows, at least as many as there are stages; part m is rows
        m::n. The part (stages - 1) / (n + stages - 1) of the time is idle.

    Raises:
      PipelineError: layers that don't divide by the stages, rows that don't by the microbatches, fewer microbatches
        than stages, a layer that changes the shape of `x` or variables of its own, or can't take a microbatch.

    >>> import jaxpar
    >>> params = jnp.stack([jnp.eye(3) * 2] * 4)
    >>> with jax.set_mesh(jaxpar.make_mesh(data=2, stage=4)):
    ...     jax.jit(lambda x: pipeline((lambda w, x: x @ w, params), x, stage_microbatches=4))(jnp.ones((8, 3)))[0]
    Array([16., 16., 16.], dtype=float32)
    """
    run = as_part(blocks)
    rows = count_rows(x, "x")
    stages, stage_microbatches = (1, 1) if takes_rows_alone() else (island_size(STAGE), stage_microbatches)
    check_microbatches(stage_microbatches, rows, stages)
    if not all(map(np.ndim, jax.tree.leaves(x))):
        raise PipelineError("x has a leaf that is a scalar; give one value a row, or pass it after x.")
    traced = check_layers(run, jax.eval_shape(lambda: take_microbatch(x, stage_microbatches, 0)), more, stages)
    check_captured("A layer", traced, stages)
    if stage_microbatches == 1:
        return run_layers(run.fn, run.leaves, x, more, 0)
    params, narrow = widen((run.leaves, more))

    def run_part(params: Any, x: Any, number: Any) -> Any:
        # Narrow in here: all microbatches' gradients are then summed in float32.
        leaves, more = narrow(params)
        return run_layers(run.fn, leaves, x, more, number)

    if stages == 1:
        parts = jax.tree.map(lambda leaf: _split(leaf, stage_microbatches), x)
        run_next = lambda part: run_part(params, part[1], part[0])
        return jax.tree.map(_join, lax.map(run_next, (jnp.arange(stage_microbatches), parts)))

    whole, narrow_x = widen(x)
    flow = _Flow(run_part, stages, stage_microbatches)
    island = jax.shard_map(
        lambda params, whole: _gpipe(flow, params, narrow_x(whole)),
        in_specs=((PartitionSpec(STAGE), PartitionSpec()), PartitionSpec()),
        out_specs=PartitionSpec(STAGE),
        axis_names={STAGE},
        check_vma=False,
    )
    # What the last stage has.
    return jax.tree.map(lambda leaf: leaf[-1], jit_island(island)(params, whole))


class _Flow(NamedTuple):
    """What of a pipeline is fixed when it is traced: `run(params, x, number)` is a stage's work on a microbatch."""

    run: Callable[..., Any]
    stages: int
    microbatches: int


def _gpipe(flow: _Flow, params: Any, x: Any) -> Any:
    """What this stage gives on each microbatch, with a leading dim for the stage."""
    stage, count = lax.axis_index(STAGE), flow.microbatches
    is_active = lambda number: (number >= 0) & (number < count)

    # Around the cond, not in it: else the loop would keep the layers' leaves of each tick beside its input.
    @jax.checkpoint
    def run(params: Any, x: Any, number: Any) -> Any:
        do = lambda x, params: flow.run(params, x, number)
        return when(is_active(number), do, lambda x, _: x, x, params)

    def tick(carry: Any, time: Any) -> Any:
        x_before, out = carry
        number = time - stage
        x_here = jax.tree.map(lambda x, sent: jnp.where(stage == 0, take_rows(x, count, number), sent), x, x_before)
        y = run(params, x_here, number)
        # What is idle at the last stage comes before its first microbatch, whose place it takes till then.
        out = put(out, y, number)
        return (send(y, flow.stages), out), None

    empty = jax.tree.map(lambda leaf: jnp.zeros_like(take_rows(leaf, count, 0)), x)
    outs = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), empty)
    (_, outs), _ = lax.scan(tick, (empty, outs), jnp.arange(count + flow.stages - 1))
    return jax.tree.map(lambda leaf: _join(leaf)[None], outs)


def _split(leaf: jax.Array, count: int) -> jax.Array:
    return jnp.moveaxis(jnp.reshape(leaf, (-1, count, *leaf.shape[1:])), 1, 0)


def _join(parts: jax.Array) -> jax.Array:
    return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])
