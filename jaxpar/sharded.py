"""The global view: `jax.jit` over a mesh; a step sees whole arrays and the compiler adds the collectives."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.batch import BatchError, match_path, name_leaf
from jaxpar.carries import split_carries
from jaxpar.layout import Layout
from jaxpar.mesh import AXIS_NAME, BATCH_AXES, check_mesh, count_shards
from jaxpar.partition import Leaf, Rules, Whole, axes_of, check_rules, match_leaf
from jaxpar.state import TrainState, is_key, named_leaves
from jaxpar.step import DriftError, Engine, StepFn, looks_for_nans
from jaxpar.strategy import Strategy


def sharded(mesh: Mesh, *rules: Rules, batch_rules: Rules = ()) -> Strategy:
    """Returns the strategy that lays the state out on `mesh` by rules, and runs steps with `jax.jit`.

    Data, model, hybrid, FSDP and ZeRO are one strategy with different rules. By default dim 0 of the batch is split
    over those of the axes `data`, `fsdp` and `expert` that the mesh has, dim 1 over `context`; scalars are replicated.

    Args:
      mesh: from `make_mesh`, or your own with the axes in jaxpar's order.
      *rules: lists of `(regex, spec)`; each fills the dims that those before it left open. None at all: replicated.
      batch_rules: one list for the batch, before the defaults; `WHOLE` is for a leaf that isn't one row an example.

    Raises:
      MeshError: the mesh has an unknown axis, or its axes are in another order or not of type Auto.
      PartitionError: a rule is malformed or names an axis that the mesh lacks.

    >>> import jaxpar
    >>> sharded(jaxpar.make_mesh(fsdp=2, model=4), jaxpar.MEGATRON, jaxpar.FSDP)
    sharded({'fsdp': 2, 'model': 4}, 2 lists of rules)
    """
    check_mesh(mesh)
    check_rules(rules, mesh)
    check_rules([batch_rules], mesh)
    batch_axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    lists = ([batch_rules] if batch_rules else []) + [[(".*", functools.partial(_split_batch, batch_axes))]]

    @functools.cache
    def batch_spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        return match_leaf(Leaf(path, shape, None), lists, mesh).spec

    @functools.cache
    def is_shared(path: str) -> bool:
        # A closed leaf is told by what the list gives, whatever the shape.
        return bool(batch_rules) and isinstance(_first_spec(batch_rules, path), Whole)

    def batch_shardings(batch: Any) -> Any:
        scale = strategy.data_shard()[1]
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(mesh, batch_spec(match_path(path), global_shape(path, leaf, scale))),
            batch,
        )

    def global_shape(path: tuple, leaf: Any, scale: int) -> tuple[int, ...]:
        if scale == 1 or not leaf.shape or is_shared(match_path(path)):
            return tuple(leaf.shape)
        return (leaf.shape[0] * scale, *leaf.shape[1:])

    def put_batch(batch: Any) -> Any:
        if jax.process_count() == 1:
            return jax.device_put(batch, batch_shardings(batch))
        scale = strategy.data_shard()[1]
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, sharding: jax.make_array_from_process_local_data(
                sharding, leaf, global_shape(path, leaf, scale)
            ),
            batch,
            batch_shardings(batch),
        )

    def abstract_batch(batch: Any) -> Any:
        scale = strategy.data_shard()[1]
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, sharding: jax.ShapeDtypeStruct(
                global_shape(path, leaf, scale), leaf.dtype, sharding=sharding
            ),
            batch,
            batch_shardings(batch),
        )

    def run_shards(fn: Callable, axes: tuple[str, ...], batch: Any) -> Callable:
        inner = fn if AXIS_NAME in axes else _bind_axis_name(fn)
        if not axes:
            return inner
        # Left to the compiler, cutting a split batch into microbatches gathers it, and every microbatch again.
        specs = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _only(batch_spec(match_path(path), leaf.shape), axes), batch
        )
        rows = {
            name_leaf(path): spec[0]
            for (path, spec), leaf in zip(
                jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(batch), strict=True
            )
            if leaf.ndim and not is_shared(match_path(path))
        }
        if len(set(rows.values())) > 1:
            raise BatchError(
                f"The batch rules split the rows over {axes} for some leaves alone, as {rows} tells; a step that cuts "
                "the batch into parts needs all split alike."
            )
        return jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=(PartitionSpec(), specs),
            out_specs=PartitionSpec(),
            axis_names=set(axes),
            check_vma=False,
        )

    def keep_rows(fn: Callable[[], Any], layout: Layout, axes: tuple[str, ...], batch: Any) -> Callable[[], Any]:
        named = [(match_path(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)]
        path, leaf = next((path, leaf) for path, leaf in named if leaf.ndim and not is_shared(path))
        # A microbatch's rows need not divide by the manual axes too.
        spec = batch_spec(path, (mesh.size, *leaf.shape[1:]))
        entry = tuple(axis for axis in axes_of(PartitionSpec(spec[0])) if axis not in axes)
        if not set(entry) & _split_axes(layout):
            return fn

        def constrain_rows(array: jax.Array) -> jax.Array:
            return _constrain(array, PartitionSpec(entry, *[PartitionSpec.UNCONSTRAINED] * (array.ndim - 1)))

        return split_carries(fn, leaf.shape[0], constrain_rows)

    engine = Engine(
        batch_spec=batch_spec,
        put_batch=put_batch,
        abstract_batch=abstract_batch,
        lower=functools.partial(_lower, mesh),
        trace=functools.partial(_trace, mesh),
        export=functools.partial(_export, mesh),
        prepare=functools.partial(_prepare, mesh),
        manual_axes=functools.partial(_manual_axes, mesh),
        run_shards=run_shards,
        constrain=_constrain,
        keep_rows=keep_rows,
    )
    name = f"sharded({dict(mesh.shape)}, {len(rules)} list{'s' * (len(rules) != 1)} of rules)"
    # A rule for every leaf, as (".*", P(("data", "model"))), splits the rows so.
    given = _first_spec(batch_rules, "")
    row_axes = (
        axes_of(PartitionSpec(given[0])) if isinstance(given, PartitionSpec) and given and given[0] else batch_axes
    )
    strategy = Strategy(name, mesh, AXIS_NAME, row_axes, count_shards(mesh, row_axes), rules, is_shared, engine)
    return strategy


def _split_batch(batch_axes: tuple[str, ...], leaf: Leaf, mesh: Mesh, so_far: PartitionSpec) -> PartitionSpec | None:
    """The default for the batch: examples over the batch axes, the sequence over `context`."""
    entries: list[Any] = [None] * len(leaf.shape)
    free = tuple(axis for axis in batch_axes if axis not in axes_of(so_far))
    if leaf.shape and so_far[0] is None and free:
        entries[0] = free
    size = mesh.shape.get("context", 1)
    if len(leaf.shape) > 1 and so_far[1] is None and "context" in mesh.shape and "context" not in axes_of(so_far):
        if leaf.shape[1] % size:
            raise BatchError(
                f"Batch leaf {leaf.path!r} has shape {leaf.shape}: dim 1, taken for the sequence, does not divide by "
                f"{size}, the size of mesh axis 'context'; pad it, or close the leaf by batch_rules=[({leaf.path!r}, "
                "jaxpar.WHOLE)] if every device needs it whole."
            )
        entries[1] = "context"
    return PartitionSpec(*entries)


def _manual_axes(mesh: Mesh, layout: Layout, accumulates: bool) -> tuple[str, ...]:
    splits = _split_axes(layout)
    # An axis that splits parameters stays the compiler's: made manual, it would gather every weight whole at entry.
    # So do fsdp and expert even where they split none: a model's own reductions name the data axis alone.
    is_manual = accumulates and mesh.shape.get(AXIS_NAME, 1) > 1 and AXIS_NAME not in splits
    # Nor is data manual beside fsdp and one of stage and model: there XLA's partitioner (jax 0.10 to 0.12) ends the
    # process over gathers, from an embedding or of each label's logit.
    would_abort = "fsdp" in splits and {"stage", "model"} & {axis for axis, size in mesh.shape.items() if size > 1}
    return (AXIS_NAME,) if is_manual and not would_abort else ()


def _constrain(array: Any, spec: PartitionSpec) -> Any:
    # A spec alone, for the mesh that is set: a sharding of `mesh` doesn't know which axes are manual here.
    return jax.lax.with_sharding_constraint(array, spec)


def _split_axes(layout: Layout) -> set[str]:
    """The axes that split parameters."""
    return {axis for row in layout.rows if row.path.startswith("params/") for axis in axes_of(row.spec)}


def _first_spec(rules: Rules, path: str) -> Any:
    return next((spec for pattern, spec in rules if re.search(pattern, path)), None)


def _only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The spec with all axes but the given ones left out."""
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    return PartitionSpec(*(tuple(axis for axis in entry if axis in axes) or None for entry in entries))


def _bind_axis_name(fn: Callable) -> Callable:
    """`fn` with the axis name that a model may reduce over bound, to an axis of size 1: it sees the whole batch."""
    bound = jax.vmap(fn, in_axes=None, out_axes=0, axis_name=AXIS_NAME, axis_size=1)

    def run(*args: Any) -> Any:
        try:
            # An island can be manual over a mesh axis only while its name isn't taken by vmap.
            return fn(*args)
        except NameError as error:
            if f"unbound axis name: {AXIS_NAME}" not in str(error):
                raise
        return jax.tree.map(lambda x: x[0], bound(*args))

    return run


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _lower(mesh: Mesh, fn: StepFn, state: Any, batch: Any, carries_state: bool, compiler_options: Any) -> Any:
    state_shardings, batch_shardings = _shardings(state), _shardings(batch)
    jitted = jax.jit(
        fn,
        in_shardings=(state_shardings, batch_shardings),
        # The state comes back as it went in: else the next call would compile again.
        out_shardings=(state_shardings, None) if carries_state else None,
        # As jit does by itself: whoever looks for a NaN needs the state from before.
        donate_argnums=(0,) if carries_state and not looks_for_nans() else (),
        compiler_options=compiler_options,
    )
    with jax.set_mesh(mesh):
        return jitted.lower(state, batch)


def _trace(mesh: Mesh, fn: StepFn, state: Any, batch: Any) -> Any:
    with jax.set_mesh(mesh):
        return jax.make_jaxpr(fn)(state, batch)


def _export(mesh: Mesh, fn: StepFn, state: Any, batch: Any, carries_state: bool) -> Any:
    (states, state_treedef), (rows, batch_treedef) = jax.tree.flatten(state), jax.tree.flatten(batch)

    def flat(states: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        result = fn(jax.tree.unflatten(state_treedef, states), jax.tree.unflatten(batch_treedef, rows))
        after, out = result if carries_state else ((), result)
        return jax.tree.leaves(after), jax.tree.leaves(out)

    jitted = jax.jit(
        flat,
        in_shardings=(_shardings(states), _shardings(rows)),
        out_shardings=(_shardings(states) if carries_state else [], None),
        donate_argnums=(0,) if carries_state else (),
        # An eval step's moments lie in memory too; of what is dropped, an export forgets the sharding.
        keep_unused=True,
    )
    with jax.set_mesh(mesh):
        # Only a program kept for another JAX needs the promise that these stay as they are.
        kernels = [export.DisabledSafetyCheck.custom_call(name) for name in ("ragged_all_to_all", "tpu_custom_call")]
        platform = mesh.devices.flat[0].platform
        return export.export(jitted, platforms=[platform], disabled_checks=kernels)(states, rows)


def _prepare(mesh: Mesh, fn: StepFn, state: Any, batch: Any, carries_state: bool, compiler_options: Any) -> StepFn:
    def compiled(fn: StepFn, state: Any, batch: Any) -> StepFn:
        return _lower(mesh, fn, state, batch, carries_state, compiler_options).compile()

    if not carries_state:
        return compiled(fn, state, batch)
    if type(state) is TrainState and isinstance(state.rng, jax.Array):
        run = _keep_key(compiled, fn, state, batch)
    else:
        run = compiled(fn, state, batch)
    return _watch_counts(run) if any(_is_count(path, leaf) for path, leaf in named_leaves(state)) else run


class _Kept(NamedTuple):
    """What of a `TrainState` a program takes over."""

    step: Any
    params: Any
    opt_state: Any
    model_state: Any
    dynamic_scale: Any


class _Given(NamedTuple):
    """What a program is given beside."""

    rng: Any
    batch: Any


def _keep_key(compiled: Callable[..., StepFn], fn: StepFn, state: TrainState, batch: Any) -> StepFn:
    """The compiled step of a `TrainState`, whose key is no result of the program where it stays as it was.

    To take a typed key over and wrap it anew costs JAX 4 % of a call on 150 leaves (jax 0.10 to 0.12). `lower`, which
    runs nothing, has the key among the results.
    """
    static, sharding = state.static, state.rng.sharding
    known = None

    def without_key(state: TrainState) -> _Kept:
        return _Kept(state.step, state.params, state.opt_state, state.model_state, state.dynamic_scale)

    def with_key(kept: _Kept, rng: jax.Array) -> TrainState:
        step, params, opt_state, model_state, dynamic_scale = kept
        return TrainState(step, params, opt_state, model_state, rng, dynamic_scale, static)

    @functools.wraps(fn)
    def keeping(state: _Kept, given: _Given) -> tuple:
        after, out = fn(with_key(state, given.rng), given.batch)
        changed = None if after.rng is given.rng else jax.lax.with_sharding_constraint(after.rng, sharding)
        return without_key(after), (changed, out)

    run = compiled(keeping, without_key(state), _Given(state.rng, batch))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        nonlocal known
        rng = state.rng
        # One that was put into the state since lies where it was made.
        if rng is not known and not rng.sharding.is_equivalent_to(sharding, rng.ndim):
            rng = jax.device_put(rng, sharding)
        kept, (changed, out) = run(without_key(state), _Given(rng, batch))
        # Each call returns its own: threads may step two states at once.
        known = rng = rng if changed is None else changed
        return with_key(kept, rng), out

    return step


def _is_count(path: str, leaf: Any) -> bool:
    return re.search(r"(^|/)model_state/", path) is not None and not (
        jnp.issubdtype(leaf.dtype, jnp.inexact) or is_key(leaf)
    )


def _watch_counts(run: StepFn) -> StepFn:
    """`run`, after whose calls 1, 2, 4, 8, ... the model's counts are compared over the devices.

    Where a step is manual over the data axis each device counts its own rows; there is no average of counts to take.
    """
    calls = 0

    def watched(state: Any, batch: Any) -> Any:
        nonlocal calls
        result = run(state, batch)
        calls += 1
        if calls & (calls - 1) == 0:
            for path, leaf in named_leaves(result[0]):
                if _is_count(path, leaf) and leaf.is_fully_replicated:
                    first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
                    if any((first != other).any() for other in others):
                        raise DriftError(
                            f"{path!r} differs among the {leaf.sharding.num_devices} devices after call {calls} of the "
                            f"step: each counted its own rows; sum them in the model, by "
                            f"jax.lax.psum(x, {AXIS_NAME!r})."
                        )
        return result

    return watched
