"""The per-device view: `jax.pmap`; a step sees one shard of the batch and names an axis to reduce over."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpar.loss import LossError
from jaxpar.mesh import AXIS_NAME, STACK_AXIS, MeshError, check_devices
from jaxpar.state import named_leaves
from jaxpar.step import DriftError, Engine, StepFn, looks_for_nans
from jaxpar.strategy import Strategy


def data_parallel(devices: Sequence[jax.Device] | None = None, axis_name: str = "data") -> Strategy:
    """Returns the strategy that replicates the state and splits the batch, with `jax.pmap`.

    For code written for the per-device view; `sharded(make_mesh(data=-1))` computes the same. The state has no device
    axis. A checksum of its bits is compared over the devices after calls 1, 2, 4, 8, ... of a step: a forgotten
    reduction would let it drift apart in silence.

    Args:
      devices: this process's devices to use; by default all of them.
      axis_name: what the model, or a step of your own, reduces over.

    Raises:
      MeshError: no device, one twice, or one of another process.

    >>> import jaxpar
    >>> jaxpar.data_parallel()
    data_parallel(8 devices, axis_name='data')
    """
    if jax.process_count() > 1:
        raise MeshError(
            f"data_parallel runs in one process, but there are {jax.process_count()}; over several use "
            "sharded(make_mesh(data=-1)), which computes the same."
        )
    chosen = list(check_devices(jax.local_devices() if devices is None else devices))
    foreign = [device for device in chosen if device.process_index != jax.process_index()]
    if foreign:
        raise MeshError(
            f"devices= holds {len(chosen)} devices, {len(foreign)} of them of other processes; give some of "
            "jax.local_devices()."
        )
    if not isinstance(axis_name, str) or not axis_name:
        raise MeshError(f"axis_name is {axis_name!r}; give a name, as 'data'.")
    mesh = Mesh(np.array(chosen), (axis_name,), axis_types=(AxisType.Auto,))
    count = len(chosen)
    split = NamedSharding(Mesh(np.array(chosen), (STACK_AXIS,)), PartitionSpec(STACK_AXIS))

    def batch_spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        return PartitionSpec(axis_name) if shape else PartitionSpec()

    def stacked_shape(leaf: Any) -> tuple[int, ...]:
        return (count, leaf.shape[0] // count, *leaf.shape[1:]) if leaf.shape else (count,)

    def put_batch(batch: Any) -> Any:
        stacked = jax.tree.map(
            lambda leaf: leaf.reshape(stacked_shape(leaf)) if leaf.shape else jnp.stack([leaf] * count),
            batch,
        )
        return jax.device_put(stacked, split)

    def abstract_batch(batch: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(stacked_shape(leaf), leaf.dtype, sharding=split), batch)

    def mapped(fn: StepFn, carries_state: bool, compiler_options: Any) -> Any:
        if compiler_options:
            raise ValueError(
                f"compiler_options={compiler_options} are for jax.jit; pmap takes none. Use "
                "sharded(make_mesh(data=-1))."
            )
        return jax.pmap(
            fn,
            axis_name,
            in_axes=(None, 0),
            out_axes=None if carries_state else (None, 0, None),
            devices=chosen,
            # Whoever looks for a NaN needs the state from before.
            donate_argnums=(0,) if carries_state and not looks_for_nans() else (),
        )

    def lower(fn: StepFn, state: Any, batch: Any, carries_state: bool, compiler_options: Any) -> Any:
        return mapped(fn, carries_state, compiler_options).lower(state, batch)

    def trace(fn: StepFn, state: Any, batch: Any) -> Any:
        return jax.make_jaxpr(jax.pmap(fn, axis_name, in_axes=(None, 0), devices=chosen))(state, batch)

    def prepare(fn: StepFn, state: Any, batch: Any, carries_state: bool, compiler_options: Any) -> StepFn:
        run = mapped(fn, carries_state, compiler_options)
        return _watch_drift(run, chosen, axis_name) if carries_state else run

    engine = Engine(
        batch_spec=batch_spec,
        put_batch=put_batch,
        abstract_batch=abstract_batch,
        lower=lower,
        trace=trace,
        export=_export,
        prepare=prepare,
        manual_axes=lambda layout, accumulates: (axis_name,),
        run_shards=lambda fn, axes, batch: _name_unbound(fn, axis_name),
        constrain=lambda array, spec: array,
        keep_rows=lambda fn, layout, axes, batch: fn,
        example_dims=2,
    )
    name = f"data_parallel({count} devices, axis_name={axis_name!r})"
    return Strategy(name, mesh, axis_name, (axis_name,), count, (), lambda path: False, engine)


def _name_unbound(fn: Callable, axis_name: str) -> Callable:
    """`fn`, in which a model that reduces over the name of all other views, where another is bound, is told so."""

    def named(*args: Any) -> Any:
        try:
            return fn(*args)
        except NameError as error:
            if axis_name == AXIS_NAME or f"unbound axis name: {AXIS_NAME}" not in str(error):
                raise
            raise LossError(
                f"The model reduces over the axis {AXIS_NAME!r}, but data_parallel(axis_name={axis_name!r}) binds "
                f"{axis_name!r}; give both one name."
            ) from error

    return named


def _export(fn: StepFn, state: Any, batch: Any, carries_state: bool) -> Any:
    raise ValueError("pmap's programs can't be exported; use sharded(make_mesh(data=-1)), which computes the same.")


def _watch_drift(run: StepFn, devices: Sequence[jax.Device], axis_name: str) -> StepFn:
    """`run`, whose results are compared over the devices after calls 1, 2, 4, 8, ...

    pmap returns with `out_axes=None` what differs on each device as if it were one, and the next step carries it on.
    """
    fingerprint = jax.pmap(_fingerprint, axis_name, in_axes=(None, 0), devices=devices)
    # pmap asks for one argument at least that is split.
    index = np.arange(len(devices))
    calls = 0

    @functools.wraps(run)
    def watched(state: Any, batch: Any) -> Any:
        nonlocal calls
        result = run(state, batch)
        calls += 1
        if calls & (calls - 1) == 0 and len(devices) > 1:
            prints = np.stack(jax.device_get(fingerprint(jax.tree.leaves(result), index)), axis=-1)
            for (path, _), drifts in zip(named_leaves(result), (prints != prints[:1]).any(axis=0), strict=True):
                if drifts:
                    where = path.removeprefix("0/") if path.startswith("0/") else f"output {path.removeprefix('1/')}"
                    raise DriftError(
                        f"{where!r} differs among the {len(devices)} devices after call {calls} of the step; reduce "
                        f"it, as jax.lax.pmean(x, {axis_name!r}), before it is returned."
                    )
        return result

    return watched


def _fingerprint(leaves: list[jax.Array], device: jax.Array) -> list[jax.Array]:
    """A number from the bits of each leaf, as this device holds it: equal bits, equal numbers."""
    del device
    return [_bits_sum(leaf) for leaf in leaves]


def _bits_sum(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    elif (jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo)(leaf.dtype).bits < 8:
        # No whole byte; float32 holds each value.
        leaf = leaf.astype(jnp.float32)
    bits = (
        jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{min(8 * leaf.dtype.itemsize, 32)}"))
        .ravel()
        .astype(jnp.uint32)
    )
    # Odd factors, so that two values exchanged don't cancel.
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
