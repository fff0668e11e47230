"""A pipeline with embedding, head and loss: 1F1B, whose backward pass runs beside its forward pass."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from jaxpar.island import island_size, jit_island, takes_rows_alone
from jaxpar.loss import Weighted, check_values, grow, is_weighted, read_loss
from jaxpar.schedule import check_name
from jaxpar.stack import (
    STAGE,
    PipelineError,
    Trace,
    as_part,
    check_captured,
    check_layers,
    check_microbatches,
    count_rows,
    join_floats,
    put,
    run_layers,
    send,
    split_floats,
    split_tree,
    take_microbatch,
    trace,
    when,
    widen,
)
from jaxpar.state import is_key


def pipeline_loss(
    first: Any,
    blocks: Any,
    last: Any,
    batch: Any,
    *,
    stage_microbatches: int,
    schedule: str = "1f1b",
) -> tuple[Weighted, dict[str, Any]]:
    """Returns `(loss, metrics)` of a whole model over stages, each `Weighted`, as a loss function gives them.

    The loss's total alone has a gradient, for the parameters alone: none goes through its weight, the metrics or the
    batch.

    The first stage takes the embedding, the last one head and loss; beside axes other than `data` all compute them, in
    step, and drop them. Under `"1f1b"` (Narayanan et al. 2021,
    https://arxiv.org/abs/2104.04473) a microbatch goes back as soon as it has come through: gradients are computed
    beside the loss, and memory doesn't grow with the number of microbatches. `"gpipe"` is JAX's own backward pass over
    all of them. Without a `stage` axis, microbatches run one after the other.

    Args:
      first: what makes the first layer's input of a microbatch: an nnx module called as `first(batch)`, or a pair
        `(fn, params)` called as `fn(params, batch)`; `params` may hold nnx modules.
      blocks: the stack of layers, as for `pipeline`.
      last: what makes the loss: `last(x, batch)`, or `fn(params, x, batch)`. It gives the loss or `(loss, metrics)`,
        means over the microbatch's rows, or `Weighted`. A table that `first` has too (tied) gets both gradients.
      batch: a pytree of arrays, their rows in dim 0; scalars are whole for each microbatch.
      stage_microbatches: into how many parts to cut the rows, at least as many as there are stages.
      schedule: `"1f1b"` or `"gpipe"`.

    Raises:
      PipelineError: as `pipeline` does; a batch that is differentiated; float16 parameters under 1F1B.
      LossError: what `last` returns can't be summed over rows.
      ScheduleError: an unknown schedule.

    >>> import jaxpar
    >>> embed, head = jnp.eye(4), jnp.ones((4, 1))
    >>> def loss_fn(layers):
    ...     first = (lambda table, batch: table[batch["x"]], embed)
    ...     last = (lambda w, x, batch: ((x @ w) ** 2).mean(), head)
    ...     loss, _ = pipeline_loss(first, (lambda w, x: x @ w, layers), last, batch, stage_microbatches=4)
    ...     return loss.total / loss.weight
    >>> layers, batch = jnp.stack([jnp.eye(4) * 2] * 4), {"x": jnp.arange(8) % 4}
    >>> with jax.set_mesh(jaxpar.make_mesh(data=2, stage=4)):
    ...     loss, gradient = jax.jit(jax.value_and_grad(loss_fn))(layers)
    >>> float(loss), gradient.shape
    (256.0, (4, 4, 4))
    """
    check_name(schedule)
    stages, stage_microbatches = (1, 1) if takes_rows_alone() else (island_size(STAGE), stage_microbatches)
    parts = tuple(map(as_part, (first, blocks, last)))
    rows = count_rows(batch, "batch")
    check_microbatches(stage_microbatches, rows, stages)
    leaves = tuple(part.leaves for part in parts)
    # Alike on every mesh: 1F1B has gradients of the loss's total alone, for parameters alone.
    batch = jax.tree.map(_refuse_gradient, batch)
    part_rows = jax.eval_shape(lambda: take_microbatch(batch, stage_microbatches, 0))
    first_trace = trace(parts[0].fn, leaves[0], part_rows, 0)
    layer_trace = check_layers(parts[1], first_trace.shapes, (), stages)
    last_trace = trace(parts[2].fn, leaves[2], first_trace.shapes, part_rows, 0)
    traces = {"first": first_trace, "blocks": layer_trace, "last": last_trace}
    if schedule == "1f1b":
        _check_no_float16(leaves)
        _check_captured(traces)
    for name, traced in traces.items():
        check_captured(name, traced, stages)
    flow = _LossFlow(tuple(part.fn for part in parts), stages, stage_microbatches)
    if stages == 1:
        return _only_total(_accumulate(flow, leaves, batch))
    floats, others = zip(*map(split_floats, leaves), strict=True)
    run = _sum_1f1b if schedule == "1f1b" else _sum_forward
    return _only_total(run(flow, floats, others, batch))


class _LossFlow(NamedTuple):
    """What of a pipeline with its loss is fixed when it is traced: the functions of embedding, one layer, head."""

    fns: tuple[Callable[..., Any], ...]
    stages: int
    microbatches: int


def _sum_forward(flow: _LossFlow, floats: Any, others: Any, batch: Any) -> tuple[Weighted, dict[str, Any]]:
    """The sums of loss and metrics; JAX's own backward pass over it is GPipe's."""
    wide, narrow = widen(floats)

    def shard(wide: Any, others: Any, batch: Any) -> Any:
        stage, run = lax.axis_index(STAGE), _bind(flow, others)
        is_active = lambda number: (number >= 0) & (number < flow.microbatches)
        x_zero, sums_zero = run.zeros(narrow(wide), batch)

        def forward(wide: Any, x: Any, number: Any) -> Any:
            # Narrow in here: all microbatches' gradients are then summed in float32.
            floats = narrow(wide)
            rows = take_microbatch(batch, flow.microbatches, number)
            x = when(stage == 0, lambda x: run.first(floats[0], rows, number), lambda x: x, x)
            y = run.layers(floats[1], x, number)
            end = lambda head, y: run.sums(head, y, rows, number)
            return y, when(stage == flow.stages - 1, end, lambda head, y: sums_zero, floats[2], y)

        # Around the cond, not in it: else the loop would keep the parameters of each tick beside its input.
        @jax.checkpoint
        def forward_or_idle(wide: Any, x: Any, number: Any) -> Any:
            return when(is_active(number), forward, lambda wide, x, number: (x, sums_zero), wide, x, number)

        def tick(carry: Any, time: Any) -> Any:
            x, sums = carry
            y, more = forward_or_idle(wide, x, time - stage)
            return (send(y, flow.stages), jax.tree.map(jnp.add, sums, more)), None

        (_, sums), _ = lax.scan(tick, (x_zero, sums_zero), jnp.arange(flow.microbatches + flow.stages - 1))
        return lax.psum(sums, STAGE)

    return _over_stages(shard, PartitionSpec())(wide, others, batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_1f1b(flow: _LossFlow, floats: Any, others: Any, batch: Any) -> tuple[Weighted, dict[str, Any]]:
    """The sums of loss and metrics; where they are differentiated, its rules below compute both at once."""
    return _sum_forward(flow, floats, others, batch)


def _sum_and_gradients(flow: _LossFlow, floats: Any, others: Any, batch: Any) -> tuple[Any, Any]:
    """The sums, and the gradients of the loss's total: stage i goes back over m at tick m + 2 x stages - 2 - i."""
    specs = (PartitionSpec(), PartitionSpec(STAGE), PartitionSpec())
    shard = functools.partial(_one_forward_one_backward, flow)
    return _over_stages(shard, (PartitionSpec(), specs))(floats, others, batch)


def _one_forward_one_backward(flow: _LossFlow, floats: Any, others: Any, batch: Any) -> tuple[Any, Any]:
    stage, depth, count = lax.axis_index(STAGE), 2 * flow.stages - 1, flow.microbatches
    run = _bind(flow, others)
    x_zero, sums_zero = run.zeros(floats, batch)
    backward = functools.partial(_go_back, flow, run, floats, batch)
    wide = lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

    def forward(x: Any, number: Any) -> tuple[Any, Any]:
        """This stage's input, and its output but at the last stage, whose backward half computes it."""
        make = lambda x: run.first(floats[0], take_microbatch(batch, count, number), number)
        x = when(stage == 0, make, lambda x: x, x)
        return x, when(stage < flow.stages - 1, lambda x: run.layers(floats[1], x, number), lambda x: x, x)

    def tick(carry: Any, time: Any) -> Any:
        x, pull, kept, gradients, sums = carry
        number = time - stage
        active = (number >= 0) & (number < count)
        anyone = time < count + flow.stages - 1
        x, y = when(active, forward, lambda x, number: (x, x), x, number, anyone=anyone)
        # What is idle takes the place of what has gone back already.
        kept = put(kept, x, number % depth)
        number = time - (2 * flow.stages - 2 - stage)
        active = (number >= 0) & (number < count)
        x = jax.tree.map(lambda slots: lax.dynamic_index_in_dim(slots, number % depth, 0, keepdims=False), kept)
        nothing = lambda x, pull, number: (pull, jax.tree.map(jnp.zeros_like, floats), sums_zero)
        anyone = time >= flow.stages - 1
        pull, more, more_sums = when(active, backward, nothing, x, pull, number, anyone=anyone)
        gradients = jax.tree.map(lambda total, part: total + part.astype(total.dtype), gradients, more)
        sums = jax.tree.map(jnp.add, sums, more_sums)
        return (send(y, flow.stages), send(pull, flow.stages, back=True), kept, gradients, sums), None

    kept = jax.tree.map(lambda leaf: jnp.zeros((depth, *leaf.shape), leaf.dtype), x_zero)
    carry = (x_zero, split_tree(x_zero)[0], kept, jax.tree.map(wide, floats), sums_zero)
    (*_, gradients, sums), _ = lax.scan(tick, carry, jnp.arange(count + 2 * flow.stages - 2))
    first, layers, head = gradients
    sums, first, head = lax.psum((sums, first, head), STAGE)
    return sums, (first, layers, head)


def _go_back(
    flow: _LossFlow, run: "_Bound", floats: Any, batch: Any, x: Any, pull: Any, number: Any
) -> tuple[Any, Any, Any]:
    """The pull on this stage's input, the gradients of its parameters, and at the last stage the sums."""
    stage, rows = lax.axis_index(STAGE), take_microbatch(batch, flow.microbatches, number)
    x_floats, join_x = split_tree(x)

    def forward(layers: Any, x_floats: Any) -> tuple[Any, Any]:
        y = run.layers(layers, join_x(x_floats), number)
        return split_tree(y)[0], y

    _, back, y = jax.vjp(forward, floats[1], x_floats, has_aux=True)

    def through_head(y: Any, pull: Any) -> Any:
        del pull
        y_floats, join_y = split_tree(y)

        def total(head: Any, y_floats: Any) -> Any:
            sums = run.sums(head, join_y(y_floats), rows, number)
            return sums[0].total, sums

        (head, pull), sums = jax.grad(total, argnums=(0, 1), has_aux=True)(floats[2], y_floats)
        return head, pull, sums

    def past_head(y: Any, pull: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, floats[2]), pull, run.zeros(floats, batch)[1]

    head, pull, sums = when(stage == flow.stages - 1, through_head, past_head, y, pull)
    layers, pull = back(pull)

    def through_first(pull: Any) -> Any:
        return jax.vjp(lambda leaves: split_tree(run.first(leaves, rows, number))[0], floats[0])[1](pull)[0]

    first = when(stage == 0, through_first, lambda pull: jax.tree.map(jnp.zeros_like, floats[0]), pull)
    return pull, (first, layers, head), sums


def _sum_1f1b_forward(flow: _LossFlow, floats: Any, others: Any, batch: Any) -> tuple[Any, Any]:
    sums, gradients = _sum_and_gradients(flow, floats, others, batch)
    return sums, (gradients, jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), floats))


def _sum_1f1b_backward(flow: _LossFlow, saved: Any, pulls: Any) -> tuple[Any, None, None]:
    gradients, likes = saved
    scale = pulls[0].total
    return jax.tree.map(lambda leaf, like: (leaf * scale).astype(like.dtype), gradients, likes), None, None


_sum_1f1b.defvjp(_sum_1f1b_forward, _sum_1f1b_backward)


def _accumulate(flow: _LossFlow, leaves: Any, batch: Any) -> tuple[Weighted, dict[str, Any]]:
    """The same without stages: one microbatch after the other."""
    first, layer, last = flow.fns
    wide, narrow = widen(leaves)

    @jax.checkpoint
    def one(wide: Any, number: Any) -> Any:
        leaves = narrow(wide)
        rows = take_microbatch(batch, flow.microbatches, number)
        x = run_layers(layer, leaves[1], first(leaves[0], rows, number), (), number)
        return _as_sums(last(leaves[2], x, rows, number), count_rows(rows, "batch"))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, wide, 0))
    add = lambda sums, number: (jax.tree.map(jnp.add, sums, one(wide, number)), None)
    return lax.scan(add, zeros, jnp.arange(flow.microbatches))[0]


class _Bound(NamedTuple):
    """The parts of a model of whose leaves the floating-point ones are still to be given; zeros of what they make."""

    first: Callable[..., Any]
    layers: Callable[..., Any]
    sums: Callable[..., Any]
    zeros: Callable[..., Any]


def _bind(flow: _LossFlow, others: Any) -> _Bound:
    first_fn, layer_fn, last_fn = flow.fns

    def first(floats: Any, rows: Any, number: Any) -> Any:
        return first_fn(join_floats(_gather(floats), others[0]), rows, number)

    def layers(floats: Any, x: Any, number: Any) -> Any:
        return run_layers(layer_fn, join_floats(floats, others[1]), x, (), number)

    def sums(floats: Any, x: Any, rows: Any, number: Any) -> Any:
        return _as_sums(last_fn(join_floats(_gather(floats), others[2]), x, rows, number), count_rows(rows, "batch"))

    def zeros(floats: Any, batch: Any) -> tuple[Any, Any]:
        rows = take_microbatch(batch, flow.microbatches, 0)
        x = jax.eval_shape(first, floats[0], rows, 0)
        shapes = x, jax.eval_shape(sums, floats[2], x, rows, 0)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return _Bound(first, layers, sums, zeros)


def _gather(floats: Any) -> Any:
    """The leaves of embedding and head, whole where `fsdp` and `model` both may split them.

    XLA's partitioner (jax 0.10 to 0.12) aborts over look-ups in what two axes split, in a shard_map over a third: in a
    table, and in logits, for the labels' sake.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if min(mesh.shape.get("fsdp", 1), mesh.shape.get("model", 1)) == 1:
        return floats
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, PartitionSpec()), floats)


def _over_stages(fn: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """`fn(floats, others, batch)` with the layers split over the stages, and all else whole at each."""
    part_specs = (PartitionSpec(), PartitionSpec(STAGE), PartitionSpec())
    in_specs = (part_specs, part_specs, PartitionSpec())
    island = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names={STAGE}, check_vma=False)
    return jit_island(island)


def _only_total(sums: tuple[Weighted, dict[str, Any]]) -> tuple[Weighted, dict[str, Any]]:
    """The sums, with a gradient through the loss's total alone."""
    loss, metrics = sums
    return Weighted(loss.total, lax.stop_gradient(loss.weight)), lax.stop_gradient(metrics)


@jax.custom_jvp
def _refuse_gradient(leaf: Any) -> Any:
    """The leaf; PipelineError where it is to be differentiated."""
    return leaf


def _refuse_tangent(primals: Any, tangents: Any) -> Any:
    if type(tangents[0]) is not SymbolicZero:
        raise PipelineError(
            f"A leaf of the batch, of shape {np.shape(primals[0])}, is computed from parameters, but pipeline_loss "
            "gives the batch no gradient: compute it in `first`, or wrap it in jax.lax.stop_gradient."
        )
    return primals[0], tangents[0]


_refuse_gradient.defjvp(_refuse_tangent, symbolic_zeros=True)


def _check_no_float16(leaves: Any) -> None:
    if any(jnp.result_type(leaf) == jnp.float16 for leaf in jax.tree.leaves(leaves) if not is_key(leaf)):
        raise PipelineError(
            "The parameters are float16, whose loss scale comes too late for 1F1B: it makes gradients beside the loss, "
            "and small ones would be lost. Use compute_dtype=jnp.bfloat16, or schedule='gpipe'."
        )


def _check_captured(traces: dict[str, Trace]) -> None:
    for name, traced in traces.items():
        if traced.captured:
            raise PipelineError(
                f"{name} uses a value of shape {traced.captured[0].shape}, to be differentiated, that is not among its "
                "parameters; give it as one of them, by (fn, params), or use schedule='gpipe'."
            )


def _as_sums(result: Any, rows: int) -> tuple[Weighted, dict[str, Any]]:
    """A loss and metrics as sums over a microbatch's rows."""
    loss, metrics, updates = read_loss(result)
    if updates is not None:
        raise PipelineError("last returned three values; give the loss, or (loss, metrics).")
    check_values({**metrics, "loss": loss}, rows)

    def sum_up(value: Any) -> Weighted:
        if isinstance(value, Weighted):
            return Weighted(grow(jnp.asarray(value.total)).sum(), grow(jnp.asarray(value.weight)).sum())
        mean = grow(jnp.asarray(value)).mean()
        return Weighted(mean * rows, jnp.full((), rows, mean.dtype))

    return sum_up(loss), jax.tree.map(sum_up, dict(metrics), is_leaf=is_weighted)
