"""`Strategy`: the contract between a step and its devices; changes with what a step may ask of them."""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxpar.batch import BatchError, count_rows, match_path, name_leaf, read_batch
from jaxpar.layout import Layout, layout_state
from jaxpar.partition import Rules
from jaxpar.state import StateError, TrainState, named_leaves

StepFn = Callable[[Any, Any], Any]


class RecompileWarning(UserWarning):
    """A batch of another shape made a step compile again."""


class Engine(NamedTuple):
    """What differs between the two views of a step: `jit` over a mesh, and `pmap`.

    Attributes:
      batch_spec: `(path, shape)` of a batch leaf -> the spec of its dims.
      put_batch: a read and checked batch -> its arrays on the devices.
      abstract_batch: a read and checked batch -> the shapes and shardings that `put_batch` would give.
      lower: `(fn, state, batch, carries_state, compiler_options)` -> `jax.stages.Lowered`.
      prepare: the same -> the callable that runs it.
      manual_axes: `(layout, num_microbatches)` -> the axes over which a step must reduce what it sums: those of which it
        sees one shard. None where the compiler reduces.
      run_shards: `(fn, manual axes, batch)` -> `fn(carry, batch)` as each of those shards runs it.
      constrain: `(array, spec)` -> the array, kept so inside a step.
      example_dims: how many leading dims of a placed leaf hold its examples: 1, or 2 as (shards, rows of one).
    """

    batch_spec: Callable[[str, tuple[int, ...]], PartitionSpec]
    put_batch: Callable[[Any], Any]
    abstract_batch: Callable[[Any], Any]
    lower: Callable[..., Any]
    prepare: Callable[..., StepFn]
    manual_axes: Callable[[Layout, int], tuple[str, ...]]
    run_shards: Callable[[Callable, tuple[str, ...], Any], Callable]
    constrain: Callable[[Any, PartitionSpec], Any]
    example_dims: int = 1


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Where state and batch live, and how a step is compiled: what `sharded` and `data_parallel` return.

    Attributes:
      name: how it was made, as text.
      mesh: the devices on their axes.
      axis_name: the name over which a model or a step of your own may reduce, as `jax.lax.pmean(x, "data")`.
      num_shards: how many ways dim 0 of the batch is split: what its rows must divide by.
      rules: the lists of rules for the state.
      shared: tells from a batch leaf's path whether every shard sees it whole.
      engine: what differs between `jit` and `pmap`.
    """

    name: str
    mesh: Mesh
    axis_name: str
    num_shards: int
    rules: tuple[Rules, ...]
    shared: Callable[[str], bool]
    engine: Engine

    def __repr__(self) -> str:
        return self.name

    def init(self, init_fn: Callable[[jax.Array], TrainState], rng: jax.Array) -> TrainState:
        """Returns the state that `init_fn` makes, created already placed: no device ever holds what it doesn't keep.

        `rng` is split: `init_fn` gets one key, and `state.rng`, from which the steps fold theirs, is the other.

        Raises:
          StateError: `init_fn` doesn't return a `TrainState`.
          PartitionError: the rules don't fit the state.

        >>> import jaxpar, optax
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=8), jaxpar.FSDP)
        >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.adam(1e-3))
        >>> strategy.init(init_fn, jax.random.key(0)).params["kernel"].addressable_shards[0].data.shape
        (8, 32)
        """
        whole = jax.eval_shape(_split_init(init_fn), rng)
        layout = self._layout_of(whole)
        # Only leaves cross jit: the optimizer in the static part is another object each time that init_fn is traced.
        create = jax.jit(lambda rng: jax.tree.leaves(_split_init(init_fn)(rng)), out_shardings=layout.shardings)
        return jax.tree.unflatten(jax.tree.structure(whole), create(rng))

    def place(self, state: TrainState) -> TrainState:
        """Returns a copy of an existing state, laid out by this strategy: pretrained, restored, or from an old loop.

        The copy is its own: the steps, which take over the memory of their state, leave the given one alone.

        >>> import jaxpar, optax
        >>> state = jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), optax.adam(1e-3))
        >>> jaxpar.data_parallel().place(state).params["kernel"].sharding.is_fully_replicated
        True
        """
        layout = self._layout_of(state)
        leaves = jax.device_put(jax.tree.leaves(state), layout.shardings, may_alias=False)
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def layout(self, state: TrainState | Callable[[jax.Array], TrainState]) -> Layout:
        """Returns where each leaf of a state lies, or of the one that an `init_fn` would make, which is not run.

        >>> import jaxpar, optax
        >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.sgd(1e-3))
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=8), jaxpar.FSDP)
        >>> strategy.layout(init_fn).rows[2][:4]
        ('params/kernel', (64, 32), dtype('float32'), PartitionSpec('fsdp', None))
        """
        return self._layout_of(
            state if isinstance(state, TrainState) else jax.eval_shape(_split_init(state), _abstract_key())
        )

    def abstract_state(self, init_fn: Callable[[jax.Array], TrainState]) -> TrainState:
        """Returns the state that `init` would give as shapes, dtypes and shardings: nothing is allocated."""
        whole = jax.eval_shape(_split_init(init_fn), _abstract_key())
        leaves = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(jax.tree.leaves(whole), self._layout_of(whole).shardings, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(whole), leaves)

    def shard_batch(self, batch: Any) -> Any:
        """Returns the batch on the devices, split as a step takes it.

        Args:
          batch: any nest of what NumPy can view, torch tensors too: the global batch in one process, the rows that
            `data_shard` names in many.

        Raises:
          BatchError: a leaf is text or ragged, leaves differ in their rows, or the rows don't divide.

        >>> import jaxpar
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
        >>> strategy.shard_batch({"x": np.ones((16, 3))})["x"].sharding.spec
        PartitionSpec('data', None)
        """
        return self.engine.put_batch(self._checked(batch))

    def abstract_batch(self, batch: Any) -> Any:
        """Returns what `shard_batch` would give as shapes, dtypes and shardings; the leaves may be shapes themselves."""
        return self.engine.abstract_batch(self._checked(batch))

    def data_shard(self) -> tuple[int, int]:
        """Returns `(index, count)`: this process must load part `index` of `count` equal parts of each global batch.

        Processes whose devices share their rows, as along a `model` axis, get the same index.

        >>> import jaxpar
        >>> jaxpar.data_parallel().data_shard()
        (0, 1)
        """
        return process_part(self.mesh, jax.process_index(), self.engine.batch_spec("", (self.num_shards,)))

    def compile(self, step: StepFn, *, compiler_options: dict[str, Any] | None = None) -> "Step":
        """Returns a step of your own, `(state, batch) -> (state, out)`, compiled for these devices.

        The state is any nest of arrays or `TrainState`s (a GAN's two, a teacher's average), laid out as `init` and
        `place` do; its memory is taken over, and it comes back laid out alike. Under `data_parallel` the step sees one
        shard of the batch, and must reduce what it returns over `axis_name`.

        Args:
          step: the function.
          compiler_options: XLA's, by name, for `jax.jit`.

        >>> import jaxpar
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
        >>> add = strategy.compile(lambda state, batch: (state + batch["x"].sum(), {}))
        >>> state = jax.device_put(np.float32(0), jax.NamedSharding(strategy.mesh, PartitionSpec()))
        >>> float(add(state, strategy.shard_batch({"x": np.ones(16)}))[0])
        16.0
        """
        return Step(self, step, compiler_options=compiler_options)

    def _layout_of(self, state: Any) -> Layout:
        if not isinstance(state, TrainState):
            raise StateError(
                f"The state is a {type(state).__name__}; init_fn returns, and place and layout take, what "
                "jaxpar.TrainState.create gives."
            )
        return layout_state(state, self.rules, self.mesh)

    def _checked(self, batch: Any) -> Any:
        batch = read_batch(batch)
        rows = count_rows(batch, self.shared)
        parts = self.num_shards // self.data_shard()[1]
        if rows % parts:
            down, up = rows - rows % parts, rows - rows % parts + parts
            name = next(
                name_leaf(path)
                for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
                if np.ndim(leaf) and not self.shared(match_path(path))
            )
            raise BatchError(
                f"Batch leaf {name} has {rows} examples, which do not divide by {parts} data shards; pad to {up} "
                f"with jaxpar.pad_batch{f', or use {down}' if down else ''}."
            )
        return batch


class Step:
    """A step compiled for a strategy: call it with `(state, batch)`, the batch as `shard_batch` gives it.

    The first call compiles; one with a batch of another shape compiles again, with a `RecompileWarning`.

    Attributes:
      strategy: the strategy.
      fn: the function that was compiled.
    """

    def __init__(
        self,
        strategy: Strategy,
        fn: StepFn,
        *,
        carries_state: bool = True,
        num_microbatches: int = 1,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.strategy, self.fn = strategy, fn
        self._carries_state, self._num_microbatches, self._compiler_options = (
            carries_state,
            num_microbatches,
            compiler_options,
        )
        self._runs: dict[Any, StepFn] = {}
        self._shapes: dict[Any, Any] = {}

    def __call__(self, state: Any, batch: Any) -> Any:
        kind = state.static if type(state) is TrainState else jax.tree.structure(state)
        leaves, treedef = jax.tree.flatten(batch)
        try:
            key = kind, treedef, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
        except AttributeError:
            raise _not_placed(batch) from None
        run = self._runs.get(key)
        if run is None:
            run = self._prepare(state, batch, key)
        try:
            return run(state, batch)
        except Exception as error:
            raise self._explain(state, batch, error) from error

    def lower(self, state: Any, batch: Any) -> Any:
        """Returns `jax.stages.Lowered` for a state and a raw global batch, arrays or shapes: for `.compile()` or text."""
        batch = self.strategy.abstract_batch(batch)
        self._check_rows(batch)
        return self.strategy.engine.lower(self.fn, state, batch, self._carries_state, self._compiler_options)

    def _prepare(self, state: Any, batch: Any, key: Any) -> StepFn:
        self._check_batch(batch)
        self._check_state(state)
        self._check_rows(batch)
        start = time.perf_counter()
        run = self.strategy.engine.prepare(self.fn, state, batch, self._carries_state, self._compiler_options)
        seconds = time.perf_counter() - start
        before = self._shapes.get(key[:2])
        if before is not None:
            name, old, new = _first_change(batch, before)
            warnings.warn(
                f"Batch leaf {name} changed from {old} to {new}: the step compiled again, in {seconds:.1f} s. Pad "
                "with jaxpar.pad_batch to keep one shape.",
                RecompileWarning,
                stacklevel=3,
            )
        self._runs[key], self._shapes[key[:2]] = run, key[2]
        return run

    def _check_batch(self, batch: Any) -> None:
        mesh_devices = set(self.strategy.mesh.devices.flat)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if not isinstance(leaf, jax.Array) or leaf.sharding.device_set != mesh_devices:
                raise _not_placed(batch, name_leaf(path))

    def _check_state(self, state: Any) -> None:
        mesh_devices = set(self.strategy.mesh.devices.flat)
        for path, leaf in named_leaves(state):
            devices = leaf.sharding.device_set if isinstance(leaf, jax.Array) else set()
            if devices != mesh_devices:
                raise StateError(
                    f"State leaf {path!r} lies on {len(devices)} devices, but {self.strategy.name} uses "
                    f"{len(mesh_devices)}; make the state with strategy.init, or strategy.place(state)."
                )
        if isinstance(state, TrainState):
            for row, leaf, sharding in zip(*_layout_parts(self.strategy.layout(state), state), strict=True):
                if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                    raise StateError(
                        f"State leaf {row.path!r} is laid out as {_spec_text(leaf.sharding)}, but "
                        f"{self.strategy.name} lays it out as {row.spec}; use strategy.place(state)."
                    )

    def _check_rows(self, batch: Any) -> None:
        strategy, count = self.strategy, self._num_microbatches
        if count == 1:
            return
        rows = _global_rows(strategy, batch)
        unit = strategy.num_shards * count
        if rows % unit:
            raise BatchError(
                f"The batch has {rows} examples, which do not divide by {strategy.num_shards} shards x {count} "
                f"microbatches = {unit}; pad to {rows - rows % unit + unit} with jaxpar.pad_batch."
            )

    def _explain(self, state: Any, batch: Any, error: Exception) -> Exception:
        """A named error where the state or batch is to blame; the error itself where not."""
        for path, leaf in named_leaves((state, batch)) if "deleted" in str(error) else ():
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                return StateError(
                    f"Leaf {path!r} of (state, batch) was given up to an earlier call of the step, which takes "
                    "over its state's memory; use the state that the call returned."
                )
        try:
            self._check_batch(batch)
            self._check_state(state)
        except (BatchError, StateError) as named:
            return named
        return error


@functools.cache
def process_part(mesh: Mesh, process: int, spec: PartitionSpec) -> tuple[int, int]:
    """Returns `(index, count)`: which of how many equal parts of a dim split by `spec` the process's devices hold.

    Raises:
      BatchError: the processes' devices interleave along the dim, so that none holds one part.
    """
    sharding = jax.NamedSharding(mesh, spec)
    rows = int(np.prod([mesh.shape[axis] for axis in mesh.axis_names]))
    parts: dict[int, set[int]] = {}
    for device, (index, *_) in sharding.devices_indices_map((rows,)).items():
        parts.setdefault(device.process_index, set()).update(range(*index.indices(rows)))
    ordered = sorted({tuple(sorted(part)) for part in parts.values()})
    mine = tuple(sorted(parts[process]))
    if any(len(part) * len(ordered) != rows or part[-1] - part[0] + 1 != len(part) for part in ordered):
        raise BatchError(
            f"The rows of a batch over the mesh {dict(mesh.shape)} interleave among {len(parts)} processes; order "
            "the devices so that each process holds neighbours along the batch axes."
        )
    return ordered.index(mine), len(ordered)


def _split_init(init_fn: Callable[[jax.Array], TrainState]) -> Callable[[jax.Array], TrainState]:
    def init(rng: jax.Array) -> TrainState:
        init_key, state_key = jax.random.split(rng)
        # The layout is the strategy's affair: Flax would place annotated variables itself, and fail without their mesh.
        with nnx.use_eager_sharding(False):
            state = init_fn(init_key)
        return state.replace(rng=state_key) if isinstance(state, TrainState) else state

    return init


def _abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _layout_parts(layout: Layout, state: Any) -> tuple[Sequence[Any], ...]:
    return layout.rows, jax.tree.leaves(state), layout.shardings


def _spec_text(sharding: Any) -> str:
    return str(getattr(sharding, "spec", sharding))


def _global_rows(strategy: Strategy, batch: Any) -> int:
    dims = strategy.engine.example_dims
    return next(
        math.prod(leaf.shape[:dims])
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if leaf.ndim >= dims and not strategy.shared(match_path(path))
    )


def _first_change(batch: Any, before: Sequence[tuple[tuple[int, ...], Any]]) -> tuple[str, Any, Any]:
    for (path, leaf), (shape, dtype) in zip(jax.tree_util.tree_leaves_with_path(batch), before, strict=True):
        if leaf.shape != shape or leaf.dtype != dtype:
            return name_leaf(path), f"{shape} {dtype}", f"{leaf.shape} {leaf.dtype}"
    return "(none)", "", ""


def _not_placed(batch: Any, name: str | None = None) -> BatchError:
    if name is None:
        name = next(
            name_leaf(path) for path, leaf in jax.tree_util.tree_leaves_with_path(batch) if not hasattr(leaf, "dtype")
        )
    return BatchError(f"Batch leaf {name} does not lie on the strategy's devices; pass strategy.shard_batch(batch).")
