"""`Step`: a function compiled for a strategy, once for each shape of its batch."""

import functools
import math
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import tree_flatten

from jaxpar.arguments import (
    check_alive,
    check_arrays,
    check_batch,
    check_batch_alive,
    check_rows,
    check_state,
    check_untraced,
)
from jaxpar.batch import BatchError, name_leaf
from jaxpar.layout import Layout
from jaxpar.stacklevel import warn_caller
from jaxpar.state import StateError, TrainState, check_is_state, named_leaves

if TYPE_CHECKING:
    from jaxpar.strategy import Strategy

StepFn = Callable[[Any, Any], Any]


class RecompileWarning(UserWarning):
    """A batch of another shape made a step compile again.

    >>> import jaxpar, warnings
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> step, state = strategy.compile(lambda state, batch: (state, {})), strategy.place(jnp.ones(()))
    >>> for rows in (8, 16):
    ...     with warnings.catch_warnings(action="error", category=RecompileWarning):
    ...         state, _ = step(state, strategy.shard_batch({"x": jnp.ones(rows)}))
    Traceback (most recent call last):
    jaxpar.step.RecompileWarning: Batch leaf ['x'] changed from (8,) float32 to (16,) float32: the step compiled...
    """


class DriftError(ValueError):
    """Devices hold different values of what must be one: the message names the leaf and the reduction it needs."""


class Engine(NamedTuple):
    """What differs between the two views of a step: `jit` over a mesh, and `pmap`.

    Attributes:
      batch_spec: `(path, shape)` of a batch leaf -> the spec of its dims.
      put_batch: a read and checked batch -> its arrays on the devices.
      abstract_batch: a read and checked batch -> the shapes and shardings that `put_batch` would give.
      lower: `(fn, state, batch, carries_state, compiler_options)` -> `jax.stages.Lowered`.
      trace: `(fn, state, batch)` -> what `jax.make_jaxpr` gives of the step.
      export: as `lower` -> `jax.export.Exported`, of flat lists of leaves: state and batch in, state and others out.
      prepare: as `lower` -> the callable that runs it.
      manual_axes: `(layout, accumulates)` -> the axes over which a step must reduce what it sums, since it sees one
        shard of them; none where the compiler reduces. `accumulates` tells whether the batch is cut into parts.
      run_shards: `(fn, manual axes, batch)` -> `fn(carry, batch)` as each of those shards runs it.
      constrain: `(array, spec)` -> the array, kept so inside a step.
      keep_rows: `(fn, layout, manual axes, batch)` -> `fn()`, in which what scans carry stays split by its rows.
      example_dims: how many leading dims of a placed leaf hold its examples: 1, or 2 as (shards, rows of one).
    """

    batch_spec: Callable[[str, tuple[int, ...]], PartitionSpec]
    put_batch: Callable[[Any], Any]
    abstract_batch: Callable[[Any], Any]
    lower: Callable[..., Any]
    trace: Callable[[StepFn, Any, Any], Any]
    export: Callable[..., Any]
    prepare: Callable[..., StepFn]
    manual_axes: Callable[[Layout, bool], tuple[str, ...]]
    run_shards: Callable[[Callable, tuple[str, ...], Any], Callable]
    constrain: Callable[[Any, PartitionSpec], Any]
    keep_rows: Callable[[Callable[[], Any], Layout, tuple[str, ...], Any], Callable[[], Any]]
    example_dims: int = 1


class Step:
    """A step compiled for a strategy: call it with `(state, batch)`, the batch as `shard_batch` gives it.

    The first call compiles; one with a batch of another shape compiles again, with a `RecompileWarning`.

    Attributes:
      strategy: the strategy.
      fn: the function that was compiled.
      num_microbatches: into how many parts it cuts the batch.
      compute_dtype: what it casts floating-point parameters to; None if it doesn't.
      carries_state: whether it gives back the state, and takes over its memory.
      compiler_options: XLA's, by name; None for its own.

    >>> import jaxpar
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
    >>> step = strategy.compile(lambda state, batch: (state + batch["x"].sum(), {}))
    >>> float(step(strategy.place(jnp.ones(())), strategy.shard_batch({"x": jnp.ones(16)}))[0])
    17.0
    """

    def __init__(
        self,
        strategy: "Strategy",
        fn: StepFn,
        *,
        carries_state: bool = True,
        num_microbatches: int = 1,
        compute_dtype: Any = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        if not callable(fn):
            raise StateError(f"step is {fn!r}; give a function (state, batch) -> (state, out).")
        if compiler_options is not None and not isinstance(compiler_options, dict):
            raise ValueError(f"compiler_options is {compiler_options!r}; give a dict of XLA's options by name.")
        self.strategy, self.fn = strategy, _keep_state(fn) if carries_state else fn
        self.carries_state, self.num_microbatches, self.compute_dtype = carries_state, num_microbatches, compute_dtype
        self.compiler_options = compiler_options
        self._runs: dict[Any, StepFn] = {}
        self._last: tuple[Any, Any] = (), None
        self._whole: Callable[[], Any] = lambda: None
        self._batches: dict[Any, Any] = {}
        self._state_shapes: dict[Any, Any] = {}

    def __call__(self, state: Any, batch: Any) -> Any:
        """Returns what the function does, for a state and a batch that lie on the strategy's devices."""
        kind, probe = (state.static, state.step) if type(state) is TrainState else _structure_of(state)
        leaves, treedef = tree_flatten(batch)
        try:
            key = kind, treedef, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
        except AttributeError:
            # What is no array was never prepared for, and is named there.
            key = None
        # To compare with the last call's key costs half of what a look-up by hash does.
        last, run = self._last
        if key != last:
            run = self._runs.get(key)
            if run is None:
                run = self._prepare(state, batch, key)
            self._last = key, run
        try:
            # JAX 0.10 crashes the process when a compiled step is given a buffer that is gone, or one twice, so look
            # before; through all of a state only where it isn't the very one that this step gave back.
            if state is not self._whole() or probe.is_deleted():
                check_alive(state, is_donated=self.carries_state)
            if True in [leaf.is_deleted() for leaf in leaves]:
                check_batch_alive(batch)
            result = run(state, batch)
            if type(state) is TrainState:
                self._whole = weakref.ref(result[0] if self.carries_state else state)
            return result
        except Exception as error:
            named = _name_nan(error) or self._explain(state, batch, self._state_shapes[kind])
            if named is None:
                raise
            raise named from error

    def lower(self, state: Any, batch: Any) -> Any:
        """Returns `jax.stages.Lowered` for a state and a raw global batch, arrays or shapes."""
        return self.strategy.engine.lower(
            self.fn, state, self._abstract(state, batch), self.carries_state, self.compiler_options
        )

    def trace(self, state: Any, batch: Any) -> Any:
        """Returns the step's jaxpr for a state and a raw global batch, arrays or shapes: nothing is compiled."""
        return self.strategy.engine.trace(self.fn, state, self._abstract(state, batch))

    def export(self, state: Any, batch: Any) -> Any:
        """Returns `jax.export.Exported` for a state and a raw global batch: the program, to compile elsewhere.

        It takes two flat lists, the leaves of the state and of the batch, and gives two back.
        """
        return self.strategy.engine.export(self.fn, state, self._abstract(state, batch), self.carries_state)

    def _abstract(self, state: Any, batch: Any) -> Any:
        batch = self.strategy.abstract_batch(batch)
        check_state(self.strategy, state)
        check_rows(self.strategy, batch, self.num_microbatches)
        return batch

    def _prepare(self, state: Any, batch: Any, key: Any) -> StepFn:
        check_is_state(state)
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                "jax_disable_jit is set, but a step is compiled ahead of time; call your own function by itself "
                "instead, as loss_fn(state.model, batch, jax.random.key(0)), under a debugger."
            )
        check_untraced(state, batch)
        check_batch(self.strategy, batch)
        check_arrays(state)
        check_state(self.strategy, state)
        check_rows(self.strategy, batch, self.num_microbatches)
        start = time.perf_counter()
        try:
            run = self.strategy.engine.prepare(self.fn, state, batch, self.carries_state, self.compiler_options)
        except Exception as error:
            if self.compiler_options and "option" in str(error) and "are for jax.jit" not in str(error):
                raise ValueError(
                    f"compiler_options={self.compiler_options} can't be used: {error}; give XLA's names and values."
                ) from error
            raise
        seconds = time.perf_counter() - start
        before = self._batches.get(key[0])
        if before is not None:
            warn_caller(
                f"{_describe_change(batch, before, self.strategy.engine.example_dims)}: the step compiled again, in "
                f"{seconds:.1f} s. Pad every batch with jaxpar.pad_batch to keep one shape.",
                RecompileWarning,
            )
        self._runs[key], self._batches[key[0]] = run, jax.tree.map(jax.typeof, batch)
        self._state_shapes[key[0]] = _shapes_of(state)
        return run

    def _explain(self, state: Any, batch: Any, shapes: Any) -> Exception | None:
        """What is wrong with the state or the batch, looked for once the step has failed; None if nothing is."""
        try:
            check_untraced(state, batch)
            check_batch(self.strategy, batch)
            check_state(self.strategy, state)
        except (BatchError, StateError) as named:
            return named
        now, other = _shapes_of(state), "make a step of its own for another model."
        if now.keys() != shapes.keys():
            return StateError(
                f"The state's leaves are not those that the step was compiled for: they differ in "
                f"{sorted(now.keys() ^ shapes.keys())[:4]}; {other}"
            )
        for path, (shape, dtype) in now.items():
            if (shape, dtype) != shapes[path]:
                was, was_of = shapes[path]
                return StateError(
                    f"State leaf {path!r} is {shape} {dtype}, but the step was compiled for {was} {was_of}; {other}"
                )
        return None


def _shapes_of(state: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {path: (leaf.shape, leaf.dtype) for path, leaf in named_leaves(state)}


def _keep_state(fn: StepFn) -> StepFn:
    """`fn`, which must return `(state, out)`, the state with the same leaves: else the next call compiles again."""

    @functools.wraps(fn)
    def keeping(state: Any, batch: Any) -> Any:
        result = fn(state, batch)
        if type(result) is not tuple or len(result) != 2:
            given = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
            raise StateError(f"The step returned {given}; it gives (state, out).")
        if jax.tree.structure(result[0]) != jax.tree.structure(state):
            was, now = ({path for path, _ in named_leaves(tree)} for tree in (state, result[0]))
            raise StateError(
                f"The step returned a state that differs from the one it got in {sorted(was ^ now) or 'containers'}; "
                "it gives that one back with new values."
            )
        for (path, old), new in zip(named_leaves(state), jax.tree.leaves(result[0]), strict=True):
            if (jnp.shape(new), jnp.result_type(new)) != (old.shape, old.dtype):
                raise StateError(
                    f"The step returned state leaf {path!r} as {jnp.shape(new)} {jnp.result_type(new)}; it was "
                    f"{old.shape} {old.dtype}, and the next call needs it so."
                )
        return result

    return keeping


def _structure_of(state: Any) -> tuple[Any, Any]:
    leaves, treedef = jax.tree.flatten(state)
    if not leaves:
        raise StateError(f"The state {state!r} has no leaf; give arrays, or what jaxpar.TrainState.create gives.")
    return treedef, leaves[0]


def _describe_change(batch: Any, before: Any, example_dims: int) -> str:
    """What of a batch is not as it was: the leaf, and both shapes."""
    old, new = (
        {name_leaf(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (before, batch)
    )
    for verb, names in (("gained", new.keys() - old.keys()), ("lost", old.keys() - new.keys())):
        if names:
            return f"The batch {verb} the leaf {', '.join(sorted(names))}"

    def show(leaf: Any) -> str:
        # A shard of pmap's has a dim of its own, which the user's batch doesn't have.
        shape = (math.prod(leaf.shape[:example_dims]), *leaf.shape[example_dims:])[: max(leaf.ndim, 1)]
        return f"{shape if leaf.ndim >= example_dims else leaf.shape} {leaf.dtype}"

    for name in new:
        if (new[name].shape, new[name].dtype) != (old[name].shape, old[name].dtype):
            return f"Batch leaf {name} changed from {show(old[name])} to {show(new[name])}"
    return "The batch changed its containers"


def looks_for_nans() -> bool:
    """Returns whether JAX is set to raise at a NaN or an infinity."""
    config: Any = jax.config
    return config.jax_debug_nans or config.jax_debug_infs


def _name_nan(error: Exception) -> Exception | None:
    # JAX's own search for the operation runs a jitted function again; it can't for a compiled one.
    if type(error).__name__ == "InternalFloatingPointError":
        found = error.args[-1]
    elif looks_for_nans() and (isinstance(error, RecursionError) or str(error).endswith("in sharded computation.")):
        # What that search ends in under pmap.
        found = "nan or an infinity"
    else:
        return None
    return FloatingPointError(
        f"The step made a {found}; to have JAX name the operation, call your own function by itself, as "
        "loss_fn(state.model, batch, jax.random.key(0)), with jax_debug_nans set."
    )
