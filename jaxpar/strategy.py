"""`Strategy`: the contract between a step and its devices; changes with what a step may ask of them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.batch import BatchError, check_weight, count_rows, match_path, name_leaf, read_batch
from jaxpar.initialisers import find_makers
from jaxpar.layout import Layout, layout_state
from jaxpar.mesh import check_is_here, is_stacked, is_target
from jaxpar.partition import Rules
from jaxpar.state import StateError, TrainState, as_key, check_is_state, leaf_path, named_leaves
from jaxpar.step import Engine, Step, StepFn


@dataclasses.dataclass(frozen=True, eq=False)
class Strategy:
    """Where state and batch live, and how a step is compiled: what `sharded` and `data_parallel` return.

    Attributes:
      name: how it was made, as text.
      mesh: the devices on their axes.
      axis_name: the name over which a model or a step of your own may reduce, as `jax.lax.pmean(x, "data")`.
      batch_axes: the mesh axes over which dim 0 of the batch is split.
      num_shards: how many ways that splits it: what its rows must divide by.
      rules: the lists of rules for the state.
      shared: tells from a batch leaf's path whether every shard sees it whole.
      engine: what differs between `jit` and `pmap`.
    """

    name: str
    mesh: Mesh
    axis_name: str
    batch_axes: tuple[str, ...]
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
          MeshError: the mesh's devices aren't here, as those of a target.

        >>> import jaxpar, optax
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=8), jaxpar.FSDP)
        >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.adam(1e-3))
        >>> strategy.init(init_fn, jax.random.key(0)).params["kernel"].addressable_shards[0].data.shape
        (8, 32)
        """
        check_is_here(self.mesh)
        rng = as_key(rng)
        whole = jax.eval_shape(_split_init(init_fn), rng)
        layout = self._layout_of(whole)
        # Only leaves cross jit: the optimizer in the static part is another object each time that init_fn is traced.
        create = jax.jit(lambda rng: jax.tree.leaves(_split_init(init_fn)(rng)), out_shardings=layout.shardings)
        return jax.tree.unflatten(jax.tree.structure(whole), create(rng))

    def place(self, state: Any) -> Any:
        """Returns a copy of an existing state, laid out by this strategy: pretrained, restored, or from an old loop.

        The copy is its own: the steps, which donate the memory of their state, leave the given one alone. A step of
        your own may carry any pytree of arrays and `TrainState`s: arrays outside one are replicated.

        Raises:
          StateError: it is a function, or a leaf is no array of numbers, a shape alone, or gone.
          PartitionError: the rules don't fit the state.
          MeshError: the mesh's devices aren't here, as those of a target.

        >>> import jaxpar, optax
        >>> state = jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), optax.adam(1e-3))
        >>> jaxpar.data_parallel().place(state).params["kernel"].sharding.is_fully_replicated
        True
        """
        check_is_here(self.mesh)
        check_is_state(state)
        # device_put gives back the very buffers where a device stays, even with may_alias=False (jax 0.10.2).
        for path, leaf in named_leaves(state):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise StateError(f"State leaf {path!r} is a shape, not an array; make the state with strategy.init.")
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise StateError(f"State leaf {path!r} is gone: a step took over its memory; place what it returned.")
            if not isinstance(leaf, jax.Array) and not _is_numeric(leaf):
                raise StateError(f"State leaf {path!r} is {leaf!r}, a {type(leaf).__name__}; give an array of numbers.")
        state = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else np.array(leaf), state)
        whole = NamedSharding(self.mesh, PartitionSpec())

        def shardings_of(part: Any) -> list[Any]:
            return self._layout_of(part).shardings if isinstance(part, TrainState) else [whole]

        is_state = lambda node: isinstance(node, TrainState)
        shardings = [s for part in jax.tree.leaves(state, is_leaf=is_state) for s in shardings_of(part)]
        return jax.tree.unflatten(jax.tree.structure(state), jax.device_put(jax.tree.leaves(state), shardings))

    def layout(self, state: TrainState | Callable[[jax.Array], TrainState]) -> Layout:
        """Returns where each leaf of a state lies, or of the one that an `init_fn` would make, which is not run.

        >>> import jaxpar, optax
        >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.sgd(1e-3))
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(fsdp=8), jaxpar.FSDP)
        >>> strategy.layout(init_fn).rows[2][:4]
        ('params/kernel', (64, 32), dtype('float32'), P('fsdp', None))
        """
        if isinstance(state, TrainState) or not callable(state):
            return self._layout_of(state)
        jaxpr, whole = jax.make_jaxpr(_split_init(state), return_shape=True)(_abstract_key())
        return self._layout_of(whole, find_makers(jaxpr))

    def abstract_state(self, init_fn: Callable[[jax.Array], TrainState]) -> TrainState:
        """Returns the state that `init` would give as shapes, dtypes and shardings: nothing is allocated.

        >>> import jaxpar, optax
        >>> init_fn = lambda rng: jaxpar.TrainState.create(nnx.Linear(64, 32, rngs=nnx.Rngs(rng)), optax.sgd(1e-3))
        >>> jaxpar.sharded(jaxpar.make_mesh(fsdp=8), jaxpar.FSDP).abstract_state(init_fn).params["kernel"].sharding.spec
        P('fsdp', None)
        """
        whole = jax.eval_shape(_split_init(init_fn), _abstract_key())
        leaves = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(jax.tree.leaves(whole), self._layout_of(whole).shardings, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(whole), leaves)

    def shard_batch(self, batch: Any) -> Any:
        """Returns the batch on the devices, split as a step takes it.

        Args:
          batch: any pytree of what NumPy can view, torch tensors too: the global batch in one process, the rows that
            `data_shard` names in many.

        Raises:
          BatchError: a leaf is text or ragged, leaves differ in their rows, or the rows don't divide.
          MeshError: the mesh's devices aren't here, as those of a target.

        >>> import jaxpar
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
        >>> strategy.shard_batch({"x": np.ones((16, 3))})["x"].sharding.spec
        P('data', None)
        """
        check_is_here(self.mesh)
        batch = self._checked(batch)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise BatchError(f"Batch leaf {name_leaf(path)} is a shape, not an array; abstract_batch takes shapes.")
        return self.engine.put_batch(batch)

    def abstract_batch(self, batch: Any) -> Any:
        """Returns what `shard_batch` would give as shapes, dtypes and shardings; it takes shapes as well as arrays.

        >>> import jaxpar
        >>> jaxpar.sharded(jaxpar.make_mesh(data=8)).abstract_batch({"x": np.ones((16, 3), "float32")})["x"].shape
        (16, 3)
        """
        return self.engine.abstract_batch(self._checked(batch))

    def data_shard(self) -> tuple[int, int]:
        """Returns `(index, count)`: this process must load part `index` of `count` equal parts of each global batch.

        Processes whose devices share their rows, as along a `model` axis, get the same index. On a target, whose
        processes aren't here either, a batch is whole.

        >>> import jaxpar
        >>> jaxpar.data_parallel().data_shard()
        (0, 1)
        """
        if is_target(self.mesh):
            return 0, 1
        return process_part(self.mesh, jax.process_index(), PartitionSpec(self.batch_axes or None))

    def compile(self, step: StepFn, *, compiler_options: dict[str, Any] | None = None) -> "Step":
        """Returns a step of your own, `(state, batch) -> (state, out)`, compiled for these devices.

        The state is any pytree of arrays or `TrainState`s (a GAN's two, a teacher's average), laid out as `init` and
        `place` do; its memory is donated, and it comes back laid out alike. Under `data_parallel` the step sees one
        shard of the batch, and must reduce what it returns over `axis_name`.

        Args:
          step: the function.
          compiler_options: XLA's, by name, for `jax.jit`.

        >>> import jaxpar
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
        >>> add = strategy.compile(lambda state, batch: (state + batch["x"].sum(), {}))
        >>> float(add(strategy.place(np.float32(0)), strategy.shard_batch({"x": np.ones(16)}))[0])
        16.0
        """
        return Step(self, step, compiler_options=compiler_options)

    def train_axes(self, layout: Layout, num_microbatches: int) -> tuple[str, ...]:
        """Returns the axes over which a train step sees one shard, and sums gradients once, at its end.

        A pipeline cuts the batch too: over axes left to the compiler, gradients would be summed in each of its ticks.

        >>> import jaxpar, optax
        >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=8))
        >>> layout = strategy.layout(jaxpar.TrainState.create(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1)))
        >>> strategy.train_axes(layout, 1), strategy.train_axes(layout, 4)
        ((), ('data',))
        """
        return self.engine.manual_axes(layout, num_microbatches > 1 or self.mesh.shape.get("stage", 1) > 1)

    def _layout_of(self, state: Any, made_whole: list[str | None] | None = None) -> Layout:
        if not isinstance(state, TrainState):
            raise StateError(
                f"The state is a {type(state).__name__}; place and layout take what jaxpar.TrainState.create gives."
            )
        return layout_state(state, self.rules, self.mesh, made_whole=made_whole)

    def _checked(self, batch: Any) -> Any:
        batch = read_batch(batch)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if is_stacked(leaf):
                raise BatchError(
                    f"Batch leaf {name_leaf(path)} of shape {leaf.shape} lies as data_parallel places it already, in "
                    f"{leaf.shape[0]} parts; give the raw batch."
                )
        rows = count_rows(batch, self.shared)
        check_weight(batch, rows)
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


@functools.cache
def process_part(mesh: Mesh, process: int, spec: PartitionSpec) -> tuple[int, int]:
    """Returns `(index, count)`: which of how many equal parts of a dim split by `spec` the process's devices hold.

    Raises:
      BatchError: the processes' devices interleave along the dim, so that none holds one part.
    """
    sharding, rows = NamedSharding(mesh, spec), mesh.size
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


def cast_params(params: Any, layout: Layout, strategy: Strategy, dtype: Any) -> Any:
    """Returns the floating-point parameters in `dtype`, still split, so that what is then gathered is as narrow."""
    if dtype is None:
        return params
    specs = param_specs(layout)

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return strategy.engine.constrain(leaf.astype(dtype), specs["params/" + leaf_path(path)])

    return jax.tree_util.tree_map_with_path(cast, params)


def check_compute_dtype(dtype: Any) -> None:
    """Raises ValueError unless it is None or a floating-point dtype that JAX keeps as it is."""
    try:
        known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"compute_dtype is {dtype!r}; give a floating-point dtype, as jnp.bfloat16, or None.")
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(
            f"compute_dtype is {dtype!r}, which JAX keeps as {jax.dtypes.canonicalize_dtype(dtype)} unless "
            "jax_enable_x64 is set; set it, or give that one."
        )


def check_strategy(strategy: Any) -> None:
    """Raises TypeError unless it is a `Strategy`."""
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"strategy is {strategy!r}; give what jaxpar.sharded(mesh, ...) or jaxpar.data_parallel() returns."
        )


def check_takes(fn: Any, name: str, *arguments: str, kind: type[Exception] = StateError) -> None:
    """Raises an error of this kind unless the function takes these arguments; one of C's may not tell."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        call = f"{name}({', '.join(arguments)})"
        raise kind(f"{name} takes {signature}, but is called as {call}; give a function {call}.") from None


def param_specs(layout: Layout) -> dict[str, PartitionSpec]:
    """Returns the spec of each parameter by its path."""
    return {row.path: row.spec for row in layout.rows if row.path.startswith("params/")}


def _split_init(init_fn: Callable[[jax.Array], TrainState]) -> Callable[[jax.Array], TrainState]:
    is_model = isinstance(init_fn, nnx.Module | nn.Module)
    if is_model or isinstance(init_fn, type) or not callable(init_fn):
        what = f"the class {init_fn.__name__}" if isinstance(init_fn, type) else f"a {type(init_fn).__name__}"
        raise StateError(
            f"init_fn is {what}; give a function of a random key that returns a jaxpar.TrainState, as lambda rng: "
            "jaxpar.TrainState.create(Model(rngs=nnx.Rngs(rng)), optax.adam(1e-3)). A state that exists is placed by "
            "strategy.place."
        )
    check_takes(init_fn, "init_fn", "rng")

    def init(rng: jax.Array) -> TrainState:
        init_key, state_key = jax.random.split(rng)
        # The layout is the strategy's affair: Flax would place annotated variables itself, and fail without their mesh.
        with nnx.use_eager_sharding(False):
            state = init_fn(init_key)
        if not isinstance(state, TrainState):
            raise StateError(
                f"init_fn returned a {type(state).__name__}; it returns what jaxpar.TrainState.create gives."
            )
        return dataclasses.replace(state, rng=state_key)

    return init


def _is_numeric(leaf: Any) -> bool:
    dtype = np.asarray(leaf).dtype
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, np.bool_)


def _abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
