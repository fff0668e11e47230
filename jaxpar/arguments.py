"""What is checked of the state and the batch that a step is given: most before a compile, what is gone at each call."""

import contextlib
import math
from typing import TYPE_CHECKING, Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding

from jaxpar.batch import BatchError, match_path, name_leaf
from jaxpar.mesh import is_stacked
from jaxpar.state import StateError, TrainState, check_is_state, named_leaves, split_params

if TYPE_CHECKING:
    from jaxpar.strategy import Strategy


def check_untraced(state: Any, batch: Any) -> None:
    """Raises StateError if the step is called inside a trace."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, batch))):
        raise StateError(
            "The step is called inside jax.jit, vmap, grad or a scan, but it is compiled by itself, for arrays on "
            "devices; call it outside of them."
        )


def check_batch(strategy: "Strategy", batch: Any) -> None:
    """Raises BatchError, which names the leaf, unless the batch lies as `strategy.shard_batch` puts it."""
    mesh_devices = set(strategy.mesh.devices.flat)
    if isinstance(batch, TrainState):
        raise BatchError("The batch is a TrainState; call the step with (state, batch).")
    if not jax.tree.leaves(batch):
        raise BatchError(f"The batch {batch!r} has no leaf; give what strategy.shard_batch returns.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not isinstance(leaf, jax.Array):
            raise BatchError(
                f"Batch leaf {name_leaf(path)} is a {type(leaf).__name__}, not an array on the strategy's devices; "
                "pass strategy.shard_batch(batch)."
            )
        # As it lies for pmap, (shards, rows of one, ...), a leaf would pass for one of as many rows as shards.
        stacked = is_stacked(leaf)
        sharding = NamedSharding(strategy.mesh, strategy.engine.batch_spec(match_path(path), leaf.shape))
        lies_so = leaf.sharding.device_set == mesh_devices and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        if not lies_so or stacked != (strategy.engine.example_dims == 2):
            spec = getattr(leaf.sharding, "spec", leaf.sharding)
            given = "data_parallel places it" if stacked else f"{spec} on {len(leaf.sharding.device_set)} devices"
            raise BatchError(
                f"Batch leaf {name_leaf(path)} of shape {leaf.shape} lies as {given}, not as {strategy.name} places it "
                f"on its {len(mesh_devices)}; pass strategy.shard_batch(batch)."
            )


def check_arrays(state: Any) -> None:
    """Raises StateError, which names it, for a leaf of the state that is no array on devices."""
    for path, leaf in named_leaves(state):
        if not isinstance(leaf, jax.Array):
            raise StateError(
                f"State leaf {path!r} is a {type(leaf).__name__}, not an array on devices; make the state with "
                "strategy.init, or place it with strategy.place(state)."
            )


def check_state(strategy: "Strategy", state: Any) -> None:
    """Raises StateError, which names the leaf, unless the state, arrays or shapes, lies as the strategy lays it out."""
    check_is_state(state)
    mesh_devices = set(strategy.mesh.devices.flat)
    for path, leaf in named_leaves(state):
        devices = getattr(getattr(leaf, "sharding", None), "device_set", ())
        if set(devices) != mesh_devices:
            raise StateError(
                f"State leaf {path!r} lies on {len(devices)} devices, but {strategy.name} uses "
                f"{len(mesh_devices)}; make the state with strategy.init, or strategy.place(state)."
            )
    parts = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TrainState))
    for part in (part for part in parts if isinstance(part, TrainState)):
        _check_optimizer(part)
        layout = strategy.layout(part)
        for row, leaf, sharding in zip(layout.rows, jax.tree.leaves(part), layout.shardings, strict=True):
            if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                raise StateError(
                    f"State leaf {row.path!r} is laid out as {getattr(leaf.sharding, 'spec', leaf.sharding)}, but "
                    f"{strategy.name} lays it out as {row.spec}; use strategy.place(state)."
                )


def check_rows(strategy: "Strategy", batch: Any, num_microbatches: int) -> None:
    """Raises BatchError unless a placed batch's rows divide by the shards times the microbatches."""
    if num_microbatches == 1:
        return
    rows = _global_rows(strategy, batch)
    unit = strategy.num_shards * num_microbatches
    if rows % unit:
        raise BatchError(
            f"The batch has {rows} examples, which do not divide by {strategy.num_shards} shards x "
            f"{num_microbatches} microbatches = {unit}; pad to {rows - rows % unit + unit} with jaxpar.pad_batch."
        )


def check_alive(state: Any, *, is_donated: bool) -> None:
    """Raises StateError, with the paths, for a leaf of the state that is gone, or there twice where it is donated."""
    leaves = jax.tree.leaves(state)
    with contextlib.suppress(AttributeError):
        is_twice = is_donated and len(set(map(id, leaves))) < len(leaves)
        if not is_twice and True not in [leaf.is_deleted() for leaf in leaves]:
            return
    seen: dict[int, str] = {}
    for path, leaf in named_leaves(state):
        if not isinstance(leaf, jax.Array):
            continue
        if leaf.is_deleted():
            raise StateError(
                f"State leaf {path!r} is gone: an earlier call of a step took over the memory of its state; use the "
                "state that the call returned, or strategy.place(state) for a copy beforehand."
            )
        if seen.setdefault(id(leaf), path) != path and is_donated:
            raise StateError(
                f"State leaves {seen[id(leaf)]!r} and {path!r} are one array, whose memory a step can take over once; "
                "give each its own, as strategy.place(state) does."
            )


def check_batch_alive(batch: Any) -> None:
    """Raises BatchError, which names it, for a leaf of the batch that is gone."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise BatchError(
                f"Batch leaf {name_leaf(path)} was deleted; place it again with strategy.shard_batch(batch)."
            )


def _global_rows(strategy: "Strategy", batch: Any) -> int:
    dims = strategy.engine.example_dims
    return next(
        math.prod(leaf.shape[:dims])
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if leaf.ndim >= dims and not strategy.shared(match_path(path))
    )


def _check_optimizer(state: TrainState) -> None:
    trained, _ = split_params(state.params, state.static.frozen)
    needed = jax.eval_shape(state.static.tx.init, trained)
    if jax.tree.structure(needed) != jax.tree.structure(state.opt_state):
        now, fits = ({path for path, _ in named_leaves(tree)} for tree in (state.opt_state, needed))
        raise StateError(
            f"The state's opt_state doesn't fit its params: they differ in {sorted(now ^ fits)[:4] or 'containers'}; "
            "make it anew with TrainState.create."
        )
