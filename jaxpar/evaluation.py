"""`make_eval_step` and `evaluate`: what a model gives on a batch, and exactly on average over a data set."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import multihost_utils

from jaxpar.batch import EXAMPLE_WEIGHT, BatchError, count_rows, pad_rows, read_batch
from jaxpar.loss import Weighted, call_model, grow, is_weighted, mean_value, sum_values
from jaxpar.state import StateError, TrainState
from jaxpar.step import RecompileWarning, Step
from jaxpar.strategy import Strategy, cast_params, check_compute_dtype, check_strategy, check_takes


@struct.dataclass
class _Shape:
    """How the values of an eval step, taken apart into sums and rows, go together again; no leaves."""

    treedef: Any = struct.field(pytree_node=False)
    is_rows: tuple[bool, ...] = struct.field(pytree_node=False)

    def join(self, sums: list[Any], rows: list[Any]) -> Any:
        """The pytree that the function returned."""
        sums_left, rows_left = iter(sums), iter(rows)
        return jax.tree.unflatten(self.treedef, [next(rows_left if kept else sums_left) for kept in self.is_rows])


class EvalStep:
    """An eval step: call it with `(state, batch)`, the batch as `shard_batch` gives it; `evaluate` goes over many.

    Attributes:
      strategy: the strategy.
      step: what is compiled: it gives sums over the batch, and rows.

    >>> import jaxpar, optax
    >>> from flax import nnx
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=-1))
    >>> state = strategy.place(jaxpar.TrainState.create(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1)))
    >>> eval_step = make_eval_step(lambda model, batch, rng: {"mean": batch["x"].mean()}, strategy)
    >>> eval_step(state, strategy.shard_batch({"x": np.full(16, 2.0)}))
    {'mean': Array(2., dtype=float32)}
    """

    def __init__(self, strategy: Strategy, step: Step):
        self.strategy, self.step = strategy, step

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """Returns what the function gives for a placed batch: means over its examples, and rows as they are."""
        sums, rows, shape = self.step(state, batch)
        return shape.join([mean_value(value) for value in sums], [self._as_rows(leaf) for leaf in rows])

    def lower(self, state: Any, batch: Any) -> Any:
        """Returns `jax.stages.Lowered` for a state and a raw global batch, arrays or shapes."""
        return self.step.lower(state, batch)

    def sum_batch(self, state: TrainState, batch: Any, num_rows: int) -> Any:
        """Returns a `Weighted` for each value: its sum over a placed batch of `num_rows` rows, and what it weighs."""
        sums, rows, shape = self.step(state, batch)
        sums = [
            Weighted(value.total * num_rows, num_rows if value.weight is None else value.weight * num_rows)
            for value in sums
        ]
        weight = batch.get(EXAMPLE_WEIGHT) if isinstance(batch, Mapping) else None
        return shape.join(sums, [self._sum_rows(leaf, weight) for leaf in rows])

    def _as_rows(self, leaf: jax.Array) -> jax.Array:
        dims = self.strategy.engine.example_dims
        return leaf if dims == 1 else leaf.reshape(-1, *leaf.shape[dims:])

    def _sum_rows(self, leaf: jax.Array, weight: jax.Array | None) -> Weighted:
        rows = self._as_rows(leaf)
        means = grow(rows).reshape(rows.shape[0], -1).mean(axis=1)
        if weight is None:
            return Weighted(means.sum(), rows.shape[0])
        weight = self._as_rows(weight)
        return Weighted((means * weight).sum(), weight.sum())


def make_eval_step(
    fn: Callable[[Any, Any, jax.Array], Any],
    strategy: Strategy,
    *,
    compute_dtype: Any = None,
    compiler_options: dict[str, Any] | None = None,
) -> EvalStep:
    """Returns `eval_step(state, batch)`, which gives what `fn(model, batch, rng)` does: metrics, or outputs.

    Args:
      fn: gives any pytree of scalars (means over the examples), `jaxpar.Weighted`, and arrays with one row an example.
        An nnx model is in eval mode; a linen one is the variables. A loss function serves as it is. `rng` is the same
        for every batch of one state.
      strategy: where to run it.
      compute_dtype: the dtype in which the model sees floating-point parameters.
      compiler_options: XLA's, by name, for `jax.jit`.

    Raises:
      ValueError: an argument that can't be; at the first call, a value that is neither a mean nor one an example.
      TypeError: `fn` is no function, or `strategy` no strategy.
      StateError: `fn` takes other arguments; at the first call, the state is no `TrainState`.

    >>> import jaxpar, optax
    >>> from flax import nnx
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=-1))
    >>> state = strategy.place(jaxpar.TrainState.create(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1)))
    >>> predict = make_eval_step(lambda model, batch, rng: model(batch["x"]), strategy)
    >>> predict(state, strategy.shard_batch({"x": np.ones((16, 3), "float32")})).shape
    (16, 2)
    """
    check_compute_dtype(compute_dtype)
    check_strategy(strategy)
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}; give a function fn(model, batch, rng).")
    check_takes(fn, "fn", "model", "batch", "rng")

    def eval_step(state: TrainState, batch: Any) -> tuple[list[Any], list[Any], _Shape]:
        if not isinstance(state, TrainState):
            raise StateError(f"The state is a {type(state).__name__}; the eval step takes a jaxpar.TrainState.")
        layout = strategy.layout(state)
        axes = strategy.engine.manual_axes(layout, False)

        def sum_shard(state: TrainState, batch: Any) -> tuple[list[Any], list[Any], _Shape]:
            device = (jax.lax.axis_index(axes),) if axes else ()
            params = cast_params(state.params, layout, strategy, compute_dtype)

            def call(rows: Any, extra: tuple) -> tuple[Any, Any]:
                keys = (state.rng, state.step, 0, *device, *extra)
                return call_model(fn, state.static, params, state.model_state, rows, keys, evaluating=True)

            fraction = 1 / math.prod(jax.lax.axis_size(axis) for axis in axes)
            values, _ = strategy.engine.keep_rows(
                lambda: sum_values(
                    call, batch, state.model_state, fraction=fraction, is_shared=strategy.shared, keep_examples=True
                ),
                layout,
                axes,
                batch,
            )()
            leaves, treedef = jax.tree.flatten(values, is_leaf=is_weighted)
            is_rows = tuple(not isinstance(leaf, Weighted) for leaf in leaves)
            sums = [leaf for leaf, kept in zip(leaves, is_rows, strict=True) if not kept]
            rows = [leaf for leaf, kept in zip(leaves, is_rows, strict=True) if kept]
            return (jax.lax.psum(sums, axes) if axes else sums), rows, _Shape(treedef, is_rows)

        return strategy.engine.run_shards(sum_shard, axes, batch)(state, batch)

    return EvalStep(
        strategy,
        Step(strategy, eval_step, carries_state=False, compute_dtype=compute_dtype, compiler_options=compiler_options),
    )


def evaluate(eval_step: EvalStep, state: TrainState, batches: Iterable[Any]) -> Any:
    """Returns each value of an eval step, averaged over all examples of a data set: floats, alike in every process.

    Values of one an example, and scalars by their rows, are averaged over the examples; `Weighted` ones by their
    weights. A batch whose rows don't divide, or with fewer rows than the first, is padded with examples that weigh
    nothing, so that batches may have any size.

    Args:
      eval_step: from `make_eval_step`.
      state: the state, which is left as it is.
      batches: raw batches, as `shard_batch` takes them; each process gives its own rows.

    Raises:
      TypeError: `eval_step` is no eval step.
      BatchError: there is no batch, or one can't be used.

    >>> import jaxpar, optax
    >>> from flax import nnx
    >>> strategy = jaxpar.sharded(jaxpar.make_mesh(data=-1))
    >>> state = strategy.place(jaxpar.TrainState.create(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1)))
    >>> step = make_eval_step(lambda model, batch, rng: {"x": batch["x"].mean(-1)}, strategy)
    >>> evaluate(step, state, [{"x": np.full((8, 3), 1.0)}, {"x": np.full((4, 3), 4.0)}])
    {'x': 2.0}
    """
    if not isinstance(eval_step, EvalStep):
        raise TypeError(f"eval_step is a {type(eval_step).__name__}; give what jaxpar.make_eval_step returns.")
    sums = []
    for batch, rows in _even_batches(eval_step.strategy, batches):
        with warnings.catch_warnings():
            # A last batch that is padded here, with a second compile, is none of its user's doing.
            warnings.filterwarnings(
                "ignore", r"The batch (gained|lost) the leaf \['example_weight'\]", RecompileWarning
            )
            sums.append(jax.device_get(eval_step.sum_batch(state, batch, rows)))
    if not sums:
        raise BatchError("batches gave no batch; evaluate needs at least one: an iterator that was used up gives none.")

    def mean(*parts: Weighted) -> float:
        weight = math.fsum(float(part.weight) for part in parts)
        return math.fsum(float(part.total) for part in parts) / weight if weight else 0.0

    return jax.tree.map(mean, *sums, is_leaf=is_weighted)


def _even_batches(strategy: Strategy, batches: Iterable[Any]) -> Iterable[tuple[Any, int]]:
    """Each batch placed, with its number of rows, padding included; every process gives as many."""
    parts = strategy.num_shards // strategy.data_shard()[1]
    usual, first = 0, None
    for batch in _agreeing(batches):
        rows = 0 if batch is None else count_rows(read_batch(batch), strategy.shared)
        target = _largest(math.ceil(max(rows, usual) / parts) * parts)
        usual, first = max(usual, rows), batch if first is None else first
        if batch is None:
            batch = _weightless(first)
        if rows != target or jax.process_count() > 1:
            batch = pad_rows(batch, target, strategy.shared)
        yield strategy.shard_batch(batch), target * strategy.data_shard()[1]


def _agreeing(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches; in many processes as many in each, None where this one has no more."""
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise BatchError(f"batches is a {type(batches).__name__}; give an iterable of batches, as [batch].")
    iterator, end = iter(batches), object()
    while True:
        batch = next(iterator, end)
        if batch is None:
            raise BatchError("batches gave None where a batch was due; give batches alone, as dicts of arrays.")
        if not _largest(0 if batch is end else 1):
            return
        yield None if batch is end else batch


def _largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(jnp.asarray(number))))


def _weightless(batch: Any) -> Any:
    if batch is None:
        raise BatchError(
            f"Process {jax.process_index()} of {jax.process_count()} has no batch while others have; give each at "
            "least one, as strategy.data_shard() tells its part."
        )
    return {**batch, EXAMPLE_WEIGHT: np.zeros(count_rows(read_batch(batch)), np.float32)}
